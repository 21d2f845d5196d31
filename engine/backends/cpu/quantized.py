"""The weight formats of quantized weights on the CPU."""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from moray.engine.backends.cpu.packed import choose_experts
from moray.engine.backends.formats import ExpertsKernel, LinearKernel, QuantizedExpert, RoutingRule
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.cpu.experts import experts, pack_expert
from moray.kernels.cpu.linear import linear, pack


class QuantizedFormat:
    """Keeps the codes, and dequantizes a weight whenever it is multiplied: right, and slow."""

    def pack_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> LinearKernel:
        """Keep a linear layer as it is."""
        return partial(_linear, weight=weight, bias=bias)

    def pack_experts(self, experts: Iterable[QuantizedExpert], *, num_experts: int, is_gated: bool) -> ExpertsKernel:
        """Keep the experts as they are."""
        kept = list(experts)
        assert len(kept) == num_experts
        return partial(_experts, kept=kept, is_gated=is_gated)


def _linear(x: Tensor, *, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return linear(x, pack(weight.dequantize(x.dtype), bias))


def _experts(
    x: Tensor,
    router_logits: Tensor,
    rule: RoutingRule,
    num_tokens: Tensor | None,
    tokens_per_expert: Tensor | None,
    *,
    kept: Sequence[QuantizedExpert],
    is_gated: bool,
) -> Tensor:
    assert num_tokens is None, "steps on the CPU have no padding"
    weights, ids = choose_experts(router_logits, rule)

    def dequantize(expert: QuantizedExpert) -> tuple[Tensor, Tensor]:
        return expert.up.dequantize(x.dtype), expert.down.dequantize(x.dtype)

    packed = [pack_expert(*dequantize(e), e.up_bias, e.down_bias, is_gated=is_gated) for e in kept]
    return experts(x, weights, ids, packed, tokens_per_expert)
