"""Cases of the GEMMs of Phi-3.5-MoE with quantized weights, with our GEMMs on bf16 weights as peers."""

from functools import partial

import torch
from torch import Tensor

from gpu.cases import Case, Op, in_turn, normal
from gpu.cases_experts import DRY_SHAPES, TOP_K, Experts
from gpu.measure import Call, turns_for
from gpu.roofline import Weights, grouped
from gpu.roofline import linear as linear_work
from moray.kernels.activation import SWIGLU
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import experts_up
from moray.kernels.gpu.grouped_gemm import SHAPES, QuantizedCase, case_label, is_multiplied
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.packed_weight import PackedWeight, Sizes, empty_packed
from moray.kernels.gpu.route import Routing
from moray.kernels.gpu.tuning import device as gpu
from moray.kernels.gpu.tuning import select_tile
from moray.kernels.gpu.weight_formats import CODE_BITS

CASES = [
    QuantizedCase("int8"),
    QuantizedCase("fp8"),
    QuantizedCase("int4", 128),
    QuantizedCase("int4", 32, has_zeros=True),
    QuantizedCase("fp8", 128),
    QuantizedCase("fp8_fp8"),
]
QKV = (6144, 4096)  # a linear layer of the model
DRY_QKV = (96, 64)


def cases(*, is_dry: bool) -> list[QuantizedCase]:
    """Return the formats that the GPU multiplies; the interpreter multiplies all, but a tiny layer has one group."""
    if is_dry:
        return list(dict.fromkeys(QuantizedCase(case.format, has_zeros=case.has_zeros) for case in CASES))
    return [case for case in CASES if is_multiplied(case.format, gpu())]


def random_packed(case: QuantizedCase, sizes: Sizes, device: torch.device) -> PackedWeight:
    """Return random weights of a scale with which outputs are about as large as inputs."""
    num_experts, n, k = sizes
    packed = empty_packed(sizes, case.format, case.group_size or None, has_zeros=case.has_zeros, device=device)
    num_groups = -(-k // case.group_size) if case.group_size else 1
    for expert in range(num_experts):
        if case.format.startswith("fp8"):
            codes = normal(n, k, dtype=torch.float32, device=device, std=100).clamp(-448, 448).to(torch.float8_e4m3fn)
            largest = 100.0
        else:
            half = 1 << (CODE_BITS[case.format] - 1)
            codes, largest = torch.randint(-half, half, (n, k), dtype=torch.int8, device=device), half / 3**0.5
        scales = (torch.rand(n, num_groups, device=device) + 0.5) * k**-0.5 / largest
        zeros = torch.randint(-2, 3, scales.shape, dtype=torch.int8, device=device) if case.has_zeros else None
        packed.set_expert(expert, codes, scales, zeros)
    return packed


def weights_of(case: QuantizedCase) -> Weights:
    """Return the size and the speed of the weights, for the bound."""
    bits = CODE_BITS[case.format] + ((40 if case.has_zeros else 32) / case.group_size if case.group_size else 0)
    return Weights(case_label(case).strip(), bits, speed=2.0 if case.format == "fp8_fp8" else 1.0)


class Quantized:
    """Cases of both GEMMs of the experts, and of one linear layer, with weights of one format."""

    def __init__(self, case: QuantizedCase, device: torch.device, *, is_dry: bool) -> None:
        self.case, self.device = case, device
        self.dense = Experts(DRY_SHAPES[0] if is_dry else SHAPES[0], device)
        up, down = self.dense.shape.up, self.dense.shape.down
        self.up_weight = random_packed(case, Sizes(up.num_experts, up.n, up.k), device)
        self.down_weight = random_packed(case, Sizes(down.num_experts, down.n, down.k), device)
        self.qkv = DRY_QKV if is_dry else QKV

    def ops(self) -> list[Op]:
        label = case_label(self.case)
        return [
            Op(f"experts_up{label}", self.up),
            Op(f"experts_down{label}", self.down),
            Op(f"linear qkv_proj{label}", self.linear),
        ]

    def up(self, rows: int) -> Case:
        dense, x, logits = self.dense, self.dense.inputs(rows), self.dense.logits(rows)
        routings = [dense.routed(one, self.block_m(rows)) for one in logits]
        theirs = [dense.routed(one, dense.tile("experts_up", rows).block_m) for one in logits]
        return self._case(
            f"experts_up{case_label(self.case)}",
            rows,
            routings,
            self.up_weight,
            in_turn(lambda r: experts_up(x, self.up_weight, r, None, SWIGLU), routings),
            in_turn(lambda r: experts_up(x, dense.layer.up, r, None, SWIGLU), theirs),
        )

    def down(self, rows: int) -> Case:
        dense, logits = self.dense, self.dense.logits(rows)
        routings = [dense.routed(one, self.block_m(rows)) for one in logits]
        theirs = [dense.routed(one, dense.tile("experts_up", rows).block_m) for one in logits]
        hidden, their_hidden = (
            self._new(len(r[0].sorted_rows), dense.shape.intermediate_size) for r in (routings, theirs)
        )
        return self._case(
            f"experts_down{case_label(self.case)}",
            rows,
            routings,
            self.down_weight,
            in_turn(lambda r: experts_down(hidden, self.down_weight, r, None), routings),
            in_turn(lambda r: experts_down(their_hidden, dense.layer.down, r, None), theirs),
        )

    def linear(self, rows: int) -> Case:
        n, k = self.qkv
        turns = turns_for(n * k * CODE_BITS[self.case.format] / 8)
        x, bias = self._new(rows, k), self._new(n)  # with the model's bias: without it the programs are others
        packed = [random_packed(self.case, Sizes(1, n, k), self.device) for _ in range(turns)]
        dense = [self._new(n, k, std=k**-0.5) for _ in range(turns)]
        return Case(
            f"linear qkv_proj{case_label(self.case)}",
            rows,
            linear_work(rows, n, k, weights_of(self.case)),
            in_turn(lambda weight: linear(x, weight, bias), packed),
            {"bf16": in_turn(lambda weight: linear(x, weight, bias), dense)},
        )

    def block_m(self, rows: int) -> int:
        """Return the rows of a block, on which both GEMMs of the experts agree."""
        key = self.up_weight.key(self.dense.shape.dtype)
        return select_tile("experts_up", key, rows * TOP_K).block_m

    def _case(
        self,
        name: str,
        rows: int,
        routings: list[Routing],
        weight: PackedWeight,
        ours: list[Call],
        theirs: list[Call],
    ) -> Case:
        hit = sum(len(set(r.topk_ids.flatten().tolist())) for r in routings) / len(routings)
        work = grouped(hit, rows * TOP_K, weight.sizes.n, weight.sizes.k, weights_of(self.case))
        return Case(name, rows, work, ours, {"bf16": theirs})

    def _new(self, *shape: int, std: float = 1.0) -> Tensor:
        return normal(*shape, dtype=self.dense.shape.dtype, device=self.device, std=std)


def of_cases(device: torch.device, *, is_dry: bool) -> list[partial[list[Op]]]:
    """Return for each format a function that makes its operations, so that only one format's weights exist."""
    return [partial(_ops, case, device, is_dry) for case in cases(is_dry=is_dry)]


def _ops(case: QuantizedCase, device: torch.device, is_dry: bool) -> list[Op]:
    return Quantized(case, device, is_dry=is_dry).ops()
