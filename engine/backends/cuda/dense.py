"""The weight format of float weights on a GPU: as they are loaded, for the kernels of kernels/gpu."""

from functools import partial

from torch import Tensor

from moray.engine.backends.formats import ExpertOutput, ExpertsKernel, ExpertWeights, LinearKernel, RoutingRule
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import experts_up, interleave
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.packed_weight import PackedWeight, as_packed
from moray.kernels.gpu.route import route
from moray.kernels.gpu.tuning import select_tile


class DenseFormat:
    """Keeps the loaded weights; only the gate and up projections of experts are reordered, in place."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> LinearKernel:
        """Use the weight as it is."""
        return partial(linear, weight=weight, bias=bias)

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        """Interleave the rows of gate and up in place, one expert at a time, so that no layer is copied as a whole."""
        if weights.is_gated:
            for expert in weights.up:
                expert.copy_(interleave(*expert.chunk(2)))
        return partial(
            run_experts,
            up=as_packed(weights.up),
            down=as_packed(weights.down),
            up_bias=weights.up_bias,
            down_bias=weights.down_bias,
            is_gated=weights.is_gated,
        )


def run_experts(
    x: Tensor,
    router_logits: Tensor,
    rule: RoutingRule,
    num_tokens: Tensor | None,
    tokens_per_expert: Tensor | None,
    *,
    up: PackedWeight,
    down: PackedWeight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    is_gated: bool,
) -> ExpertOutput:
    """Choose each token's experts and run them; an ExpertsKernel."""
    tile = select_tile("experts_up", up.key(x.dtype), len(x) * rule.top_k)
    routing = route(
        router_logits,
        method=rule.method,
        top_k=rule.top_k,
        jitter=rule.jitter,
        block_m=tile.block_m,
        num_tokens=num_tokens,
        tokens_per_expert=tokens_per_expert,
    )
    hidden = experts_up(x, up, routing, up_bias, is_gated)
    return ExpertOutput(experts_down(hidden, down, routing, down_bias), rule.top_k)
