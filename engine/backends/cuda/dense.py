"""The weight format of float weights on a GPU: as they are loaded, for the kernels of kernels/gpu."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from moray.engine.backends.communicator import ALONE, Communicator, gather_of
from moray.engine.backends.formats import (
    Activation,
    ExpertOutput,
    ExpertsKernel,
    ExpertWeights,
    LinearKernel,
    RoutingRule,
)
from moray.engine.errors import DeviceError
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import ROWS_TOGETHER, experts_up, interleave
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.packed_weight import PackedWeight, as_packed
from moray.kernels.gpu.route import route
from moray.kernels.gpu.tuning import select_tile


class DenseFormat:
    """Keeps the loaded weights; only the gate and up projections of experts are reordered, in place."""

    def __init__(self, communicator: Communicator = ALONE) -> None:
        self._communicator = communicator

    def pack_linear(self, weight: Tensor, bias: Tensor | None, num_outputs: int) -> LinearKernel:
        """Use the weight as it is."""
        return partial(linear, weight=as_packed(weight), bias=bias, num_outputs=num_outputs)

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        """Interleave the rows of gate and up in place, one expert at a time, so that no layer is copied as a whole.

        Raises DeviceError for a part of the experts that the kernels cannot interleave.
        """
        up_bias = weights.up_bias
        if weights.activation.is_gated:
            check_gate(weights.up.shape[1] // 2, self._communicator)
            for expert in weights.up:
                expert.copy_(interleave(*expert.chunk(2)))
            up_bias = None if up_bias is None else interleave(*up_bias[..., None].chunk(2, -2))[..., 0]
        return partial(
            run_experts,
            up=as_packed(weights.up),
            down=as_packed(weights.down),
            up_bias=up_bias,
            down_bias=weights.down_bias,
            activation=weights.activation,
            gather=gather_of(self._communicator),
        )


def check_gate(num_outputs: int, communicator: Communicator) -> None:
    """Raise DeviceError unless the gate's outputs of an expert, of this rank, can be interleaved with those of up."""
    if num_outputs % ROWS_TOGETHER:
        size = communicator.partition.size
        raise DeviceError(
            f"The gate of an expert has {num_outputs} outputs on a rank (engine.tensor_parallel: {size}), and a GPU's "
            f"kernels need a multiple of {ROWS_TOGETHER}. {'Lower it, or use' if size > 1 else 'Use'} device: cpu."
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
    activation: Activation,
    gather: Callable[[Tensor], Tensor] | None,
) -> ExpertOutput:
    """Choose each token's experts and run them; an ExpertsKernel. gather: of the columns of all ranks"""
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
    in_order = gather is not None
    hidden = experts_up(x, up, routing, up_bias, activation, in_order=in_order)
    if gather is not None:
        hidden = gather(hidden)
    rows = experts_down(hidden, down, routing, down_bias, in_order=in_order)
    return ExpertOutput(rows if gather is None else gather(rows), rule.top_k)
