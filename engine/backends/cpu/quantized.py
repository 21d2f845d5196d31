"""The weight format of quantized weights on the CPU: packed for the kernels of kernels/cpu/quantized.py."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from moray.engine.backends.communicator import ALONE, Communicator, gather_of
from moray.engine.backends.cpu.packed import check_parts, run_experts, run_whole_experts
from moray.engine.backends.formats import Activation, ExpertsKernel, LinearKernel, QuantizedExpert
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.cpu.experts import PackedExpert, PackedExperts
from moray.kernels.cpu.quantized import PackedQuantized, paths
from moray.kernels.cpu.quantized_calls import QuantizedLinear
from moray.kernels.cpu.self_check import checked_pack_quantized


class QuantizedPackedFormat:
    """Copies the codes into the layout of the best kernel that passes the check for their shape."""

    def __init__(self, communicator: Communicator = ALONE) -> None:
        self._communicator = communicator

    def pack_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, num_outputs: int
    ) -> LinearKernel:
        """Pack a linear layer; the codes are not kept.

        Raises DeviceError if the weight is split among ranks and the kernel does not allow that.
        """
        return QuantizedLinear(self._allowed(_pack(weight, bias, dtype), dtype), dtype)

    def pack_experts(
        self, experts: Iterable[QuantizedExpert], dtype: torch.dtype, *, num_experts: int, activation: Activation
    ) -> ExpertsKernel:
        """Pack the experts one by one; the codes are not kept.

        Raises DeviceError if the weights are split among ranks and a kernel does not allow that.
        """
        packed = PackedExperts(_pack_expert(expert, activation, dtype) for expert in experts)
        if self._communicator.partition.expert_parallel:
            return partial(run_whole_experts, packed=packed, communicator=self._communicator)
        for part in (packed[0].up, packed[0].down):
            assert isinstance(part, PackedQuantized)
            self._allowed(part, dtype)
        return partial(run_experts, packed=packed, gather=gather_of(self._communicator))

    def _allowed(self, packed: PackedQuantized, dtype: torch.dtype) -> PackedQuantized:
        """Return a packed weight, if its kernel allows what the ranks have of it."""
        check_parts(self._communicator, packed, packed.path, paths(packed.kind, dtype)[0], packed.kind)
        return packed


def _pack_expert(expert: QuantizedExpert, activation: Activation, dtype: torch.dtype) -> PackedExpert:
    down, up, up_bias, gate = _pack(expert.down, expert.down_bias, dtype), expert.up, expert.up_bias, None
    if activation.is_gated:
        of_gate, up = up.split_rows(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        gate = _pack(of_gate, gate_bias, dtype)
    return PackedExpert(gate, _pack(up, up_bias, dtype), down, activation)


def _pack(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedQuantized:
    return checked_pack_quantized(
        weight.codes, weight.scales, weight.group_size, weight.zeros, weight.kind, dtype, bias
    )
