"""Expert layers: routing, the weights of all experts of a layer, fused, and the calls into the grouped kernels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.layers.backend import Backend
from engine.layers.norm import Norm
from kernels.cpu.experts import PackedExpert, experts, pack_expert
from kernels.cpu.route import softmax_topk, sparsemixer

Method = Literal["sparsemixer", "softmax"]


class Experts(nn.Module):
    """Sends each token to its experts, adds what they give to the residual and normalises it for the next block.

    What kind of experts they are, and which tensors they are loaded from, is its subclasses' matter.

    tokens_per_expert: [num_experts] int64, where tokens are to be counted: each forward adds its own
    """

    tokens_per_expert: Tensor | None = None

    def __init__(self, config: ModelConfig, method: Method) -> None:
        super().__init__()
        self.method, self.top_k, self.jitter = method, config.num_experts_per_tok, config.router_jitter
        self.num_experts = config.num_experts
        self._packed: Sequence[PackedExpert] | None = None
        self._fused: _Fused | None = None

    def forward(
        self, x: Tensor, router_logits: Tensor, residual: Tensor, next_norm: Norm, num_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [rows, hidden_size]; router_logits: [rows, num_experts]; num_tokens: as in ModelInputs
        -> the new residual and that normalised, both [rows, hidden_size]
        """
        if self._fused is not None:
            return self._run_fused(self._fused, x, router_logits, residual, next_norm, num_tokens)
        assert self._packed is not None, "prepare() comes before the first forward"
        if self.method == "sparsemixer":
            weights, ids = sparsemixer(router_logits, self.jitter)
        else:
            weights, ids = softmax_topk(router_logits, self.top_k)
        return next_norm.add(experts(x, weights, ids, self._packed, self.tokens_per_expert), residual)

    def _run_fused(
        self,
        fused: "_Fused",
        x: Tensor,
        router_logits: Tensor,
        residual: Tensor,
        next_norm: Norm,
        num_tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from kernels.gpu import combine, experts_down, experts_up, route, tiles

        key = tiles.Key(fused.up.shape[1], fused.up.shape[2], x.dtype, self.num_experts)
        block_m = tiles.choose("experts_up", key, len(x) * self.top_k).block_m
        routing = route.route(
            router_logits,
            method=self.method,
            top_k=self.top_k,
            jitter=self.jitter,
            block_m=block_m,
            num_tokens=num_tokens,
            tokens_per_expert=self.tokens_per_expert,
        )
        hidden = experts_up.experts_up(x, fused.up, routing, fused.up_bias, fused.is_gated)
        rows = experts_down.experts_down(hidden, fused.down, routing, fused.down_bias)
        return combine.combine(rows, residual, next_norm.weight, next_norm.bias, next_norm.eps, self.top_k)


class _Fused:
    """The experts of a layer as the grouped GEMMs read them: see kernels/gpu/experts_up.py and experts_down.py."""

    def __init__(
        self, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, *, is_gated: bool
    ) -> None:
        self.up, self.down, self.up_bias, self.down_bias, self.is_gated = up, down, up_bias, down_bias, is_gated


class GatedExperts(Experts):
    """SwiGLU experts without bias: down(silu(gate x) * (up x)).

    gate_up_proj: [num_experts, 2 * intermediate_size, hidden_size], gate first
    down_proj:    [num_experts, hidden_size, intermediate_size]
    """

    def __init__(self, config: ModelConfig, method: Method) -> None:
        super().__init__(config, method)
        e, i, h = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj: nn.Parameter | None = nn.Parameter(torch.empty(e, 2 * i, h), requires_grad=False)
        self.down_proj: nn.Parameter | None = nn.Parameter(torch.empty(e, h, i), requires_grad=False)

    def prepare(self, backend: Backend) -> None:
        assert self.gate_up_proj is not None and self.down_proj is not None, "a layer is prepared once"
        if backend == "triton":
            from kernels.gpu.experts_up import interleave

            for of_expert in self.gate_up_proj.data:  # one at a time: no second copy of a layer
                of_expert.copy_(interleave(*of_expert.chunk(2)))
            self._fused = _Fused(self.gate_up_proj.data, self.down_proj.data, None, None, is_gated=True)
        else:
            weights = zip(self.gate_up_proj, self.down_proj, strict=True)
            self._packed = [pack_expert(*of_expert, is_gated=True) for of_expert in weights]
            self.gate_up_proj = self.down_proj = None


class UngatedExperts(Experts):
    """Phi-2's MLP as experts: fc2(gelu_new(fc1 x)), with biases.

    fc1: [num_experts, intermediate_size, hidden_size]; fc2: [num_experts, hidden_size, intermediate_size]
    """

    def __init__(self, config: ModelConfig, method: Method) -> None:
        super().__init__(config, method)
        e, i, h = config.num_experts, config.intermediate_size, config.hidden_size
        self.fc1: nn.Parameter | None = nn.Parameter(torch.empty(e, i, h), requires_grad=False)
        self.fc2: nn.Parameter | None = nn.Parameter(torch.empty(e, h, i), requires_grad=False)
        self.fc1_bias = nn.Parameter(torch.empty(e, i), requires_grad=False)
        self.fc2_bias = nn.Parameter(torch.empty(e, h), requires_grad=False)

    def prepare(self, backend: Backend) -> None:
        assert self.fc1 is not None and self.fc2 is not None, "a layer is prepared once"
        if backend == "triton":
            biases = self.fc1_bias.data, self.fc2_bias.data
            self._fused = _Fused(self.fc1.data, self.fc2.data, *biases, is_gated=False)
        else:
            weights = zip(self.fc1, self.fc2, self.fc1_bias, self.fc2_bias, strict=True)
            self._packed = [pack_expert(*of_expert, is_gated=False) for of_expert in weights]
            self.fc1 = self.fc2 = None
