"""The weight format of quantized weights on the CPU: packed for the kernels of kernels/cpu/quantized.py."""

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from moray.engine.backends.cpu.packed import run_experts
from moray.engine.backends.formats import ExpertsKernel, LinearKernel, QuantizedExpert
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.cpu.experts import PackedExpert
from moray.kernels.cpu.quantized import PackedQuantized, pack_quantized, quantized_linear


class QuantizedPackedFormat:
    """Copies the codes into the layout of the kernels."""

    def pack_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> LinearKernel:
        """Pack a linear layer; the codes are not kept."""
        return partial(quantized_linear, packed=_pack(weight, bias))

    def pack_experts(self, experts: Iterable[QuantizedExpert], *, num_experts: int, is_gated: bool) -> ExpertsKernel:
        """Pack the experts one by one; the codes are not kept."""
        return partial(run_experts, packed=[_pack_expert(expert, is_gated) for expert in experts])


def _pack_expert(expert: QuantizedExpert, is_gated: bool) -> PackedExpert:
    down = _pack(expert.down, expert.down_bias)
    if not is_gated:
        return PackedExpert(None, _pack(expert.up, expert.up_bias), down)
    assert expert.up_bias is None, "gated experts have no biases in any supported checkpoint"
    gate, up = expert.up.split_rows(2)
    return PackedExpert(_pack(gate), _pack(up), down)


def _pack(weight: QuantizedWeight, bias: Tensor | None = None) -> PackedQuantized:
    return pack_quantized(weight.codes, weight.scales, weight.group_size, weight.zeros, weight.kind, bias)
