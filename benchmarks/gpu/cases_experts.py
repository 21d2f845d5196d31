"""Cases of a layer's experts: routing, both GEMMs and the sum, one by one and together up to the next norm."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import vllm_experts
from gpu.cases import Case, Op, in_turn, normal
from gpu.roofline import ITEM, Work, grouped
from moray.kernels.activation import GELU
from moray.kernels.gpu.combine import combine
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import experts_up
from moray.kernels.gpu.grouped_gemm import SHAPES, ExpertShape
from moray.kernels.gpu.norms import add_layer_norm
from moray.kernels.gpu.route import Routing, route
from moray.kernels.gpu.tuning import TileConfig, select_tile

TOP_K = 2
TURNS = 4  # routings that are used in turn: with few tokens each reads other experts
DRY_SHAPES = [
    ExpertShape("phi-3.5-moe", 4, 64, 48, torch.bfloat16),
    ExpertShape("phixtral-4x2_8", 4, 64, 48, torch.float16, GELU, has_bias=True),
]


@dataclass(frozen=True)
class Layer:
    """Holds the weights of one layer of experts, and of the norm after it.

    Peers read the gate's rows of `up` first; the values are random in either case.
    """

    shape: ExpertShape
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor

    @classmethod
    def random(cls, shape: ExpertShape, device: torch.device) -> "Layer":
        new = partial(normal, dtype=shape.dtype, device=device)
        up, down = shape.up, shape.down
        return cls(
            shape,
            new(up.num_experts, up.n, up.k, std=up.k**-0.5),
            new(down.num_experts, down.n, down.k, std=down.k**-0.5),
            None if not shape.has_bias else new(up.num_experts, up.n),
            None if not shape.has_bias else new(up.num_experts, down.n),
            new(shape.hidden_size) + 1,
            new(shape.hidden_size),
        )


class Experts:
    """Cases of one model's expert layer."""

    def __init__(self, shape: ExpertShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.layer = Layer.random(shape, device)

    def ops(self) -> list[Op]:
        parts = [Op(f"route {self.shape.name}", self.route), Op(f"experts_up {self.shape.name}", self.up)]
        parts += [Op(f"experts_down {self.shape.name}", self.down), Op(f"combine {self.shape.name}", self.combine)]
        return [*parts, Op(f"expert layer {self.shape.name}", self.whole)]

    def route(self, rows: int) -> Case:
        logits = self.logits(rows)
        num_bytes = rows * (ITEM * self.shape.num_experts + 12 * TOP_K)
        # as in a captured decode step, where the number of tokens is on the device
        count = torch.tensor([rows], dtype=torch.int32, device=self.device)
        block_m = self.tile("experts_up", rows).block_m
        calls = in_turn(partial(self.routed, block_m=block_m, num_tokens=count), logits)
        return Case(f"route {self.shape.name}", rows, Work(num_bytes), calls)

    def up(self, rows: int) -> Case:
        layer, x, logits = self.layer, self.inputs(rows), self.logits(rows)
        block_m = self.tile("experts_up", rows).block_m
        routings = [self.routed(one, block_m) for one in logits]
        ours = in_turn(lambda r: experts_up(x, layer.up, r, layer.up_bias, self.shape.activation), routings)
        peers = {}
        if self.shape.is_gated:
            for name, tile in self._vllm_tiles("experts_up", rows).items():
                theirs = [self.routed(one, tile.block_m) for one in logits]
                peers[name] = in_turn(partial(vllm_experts.up, x, layer.up, tile=tile), theirs)
        return Case(
            f"experts_up {self.shape.name}", rows, self._work(routings, self.shape.up.n, self.shape.up.k), ours, peers
        )

    def down(self, rows: int) -> Case:
        layer, logits = self.layer, self.logits(rows)
        block_m = self.tile("experts_up", rows).block_m
        routings = [self.routed(one, block_m) for one in logits]
        hidden = self._new(len(routings[0].sorted_rows), self.shape.intermediate_size)
        ours = in_turn(lambda r: experts_down(hidden, layer.down, r, layer.down_bias), routings)
        peers = {}
        if self.shape.is_gated:
            for name, tile in self._vllm_tiles("experts_down", rows).items():
                theirs = [self.routed(one, tile.block_m) for one in logits]
                by_token = hidden[: rows * TOP_K]
                peers[name] = in_turn(partial(vllm_experts.down, by_token, layer.down, tile=tile), theirs)
        return Case(
            f"experts_down {self.shape.name}",
            rows,
            self._work(routings, self.shape.down.n, self.shape.down.k),
            ours,
            peers,
        )

    def combine(self, rows: int) -> Case:
        layer, residual = self.layer, self.inputs(rows)
        of_slots = self._new(rows * TOP_K, self.shape.hidden_size)
        calls = [partial(combine, of_slots, residual, layer.norm_weight, layer.norm_bias, 1e-5, TOP_K)] * 2
        num_bytes = ITEM * rows * self.shape.hidden_size * (TOP_K + 3)
        return Case(f"combine {self.shape.name}", rows, Work(num_bytes), calls)

    def whole(self, rows: int) -> Case:
        """Measure everything from router logits to the next norm. The bound is that of the two GEMMs."""
        shape, x, residual, logits = self.shape, self.inputs(rows), self.inputs(rows), self.logits(rows)
        routings = [self.routed(one, 16) for one in logits]
        work = self._work(routings, shape.up.n, shape.up.k) + self._work(routings, shape.down.n, shape.down.k)
        peers = {}
        if shape.is_gated:
            for name, up in self._vllm_tiles("experts_up", rows).items():
                down = self._vllm_tiles("experts_down", rows)[name]
                peers[name] = in_turn(partial(self._vllm, x, residual, up, down), logits)
            if shape.dtype == torch.bfloat16:
                peers["grouped_mm"] = in_turn(partial(self._grouped_mm, x, residual), logits)
        return Case(f"expert layer {shape.name}", rows, work, in_turn(partial(self.run, x, residual), logits), peers)

    def run(self, x: Tensor, residual: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        routing = self.routed(logits, self.tile("experts_up", len(x)).block_m)
        hidden = experts_up(x, layer.up, routing, layer.up_bias, self.shape.activation)
        rows = experts_down(hidden, layer.down, routing, layer.down_bias)
        return combine(rows, residual, layer.norm_weight, layer.norm_bias, 1e-5, TOP_K)

    def _vllm(
        self, x: Tensor, residual: Tensor, up: TileConfig, down: TileConfig, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run vLLM's order of work: it sorts once, so both GEMMs have the same block_m."""
        layer = self.layer
        routing = self.routed(logits, up.block_m)
        rows = vllm_experts.down(vllm_experts.up(x, layer.up, routing, up), layer.down, routing, down)
        return combine(rows, residual, layer.norm_weight, layer.norm_bias, 1e-5, TOP_K)

    def _grouped_mm(self, x: Tensor, residual: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer with torch's grouped_mm: sort, two products, the activation, unsort, sum."""
        layer = self.layer
        weights, ids = logits.float().topk(TOP_K)
        weights = weights.softmax(-1)
        order = ids.flatten().argsort()
        ends = torch.searchsorted(
            ids.flatten()[order], torch.arange(1, self.shape.num_experts + 1, device=x.device), out_int32=True
        )
        both = F.grouped_mm(x[order // TOP_K], layer.up.transpose(1, 2), offs=ends)
        gate, linear = both.chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * linear, layer.down.transpose(1, 2), offs=ends)
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        summed = torch.empty_like(rows).index_copy_(0, order, rows).view(len(x), TOP_K, -1).sum(1)
        return add_layer_norm(summed, residual, layer.norm_weight, layer.norm_bias, 1e-5)

    def _vllm_tiles(self, op: str, rows: int) -> dict[str, TileConfig]:
        """Return the tiles to measure vLLM's kernel with, by name; none where the kernel was not cut out."""
        if not vllm_experts.KERNEL.exists():
            return {}
        tile = self.tile(op, rows)
        return {
            "vllm's kernel, its tiles": vllm_experts.rule(rows, self.shape.num_experts),
            "vllm's kernel, our tiles": tile,
        }

    def _work(self, routings: list[Routing], n: int, k: int) -> Work:
        """Return the work of one call, with the experts that these routings use."""
        hit = sum(len(set(r.topk_ids.flatten().tolist())) for r in routings) / len(routings)
        return grouped(hit, routings[0].topk_ids.numel(), n, k)

    def tile(self, op: str, rows: int) -> TileConfig:
        return select_tile(op, self.shape.up if op == "experts_up" else self.shape.down, rows * TOP_K)

    def routed(self, logits: Tensor, block_m: int, num_tokens: Tensor | None = None) -> Routing:
        method = "sparsemixer" if self.shape.name.startswith("phi-3") else "softmax"
        return route(logits, method=method, top_k=TOP_K, jitter=0.01, block_m=block_m, num_tokens=num_tokens)  # type: ignore[arg-type]

    def logits(self, rows: int) -> list[Tensor]:
        return list(self._new(TURNS, rows, self.shape.num_experts).unbind())

    def inputs(self, rows: int) -> Tensor:
        return self._new(rows, self.shape.hidden_size)

    def _new(self, *shape: int) -> Tensor:
        return normal(*shape, dtype=self.shape.dtype, device=self.device)


def shapes(is_dry: bool) -> list[ExpertShape]:
    return DRY_SHAPES if is_dry else SHAPES
