"""The weight format of quantized weights on a GPU: codes in words of 32 bits, for the kernels of kernels/gpu."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moray.engine.backends.communicator import ALONE, Communicator, gather_of
from moray.engine.backends.cuda.dense import check_gate, run_experts
from moray.engine.backends.formats import Activation, ExpertsKernel, LinearKernel, QuantizedExpert
from moray.engine.errors import DeviceError
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.gpu.experts_up import interleave
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.packed_weight import PackedWeight, Sizes, empty_packed
from moray.kernels.gpu.weight_formats import PackedFormat


class PackedCodesFormat:
    """Copies codes into words, whatever the dtype of the activations, which the kernels multiply them by."""

    def __init__(self, fp8: Literal["fp8", "fp8_fp8"] = "fp8", communicator: Communicator = ALONE) -> None:
        """Choose the kernels of fp8 weights.

        fp8: by which rows they are multiplied: those of the model's dtype, or "fp8_fp8": rows that are rounded to fp8.
             That is for measuring: no backend has it, because answers would depend on the GPU (decision 24).
        """
        self._fp8: PackedFormat = fp8
        self._communicator = communicator

    def pack_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, num_outputs: int
    ) -> LinearKernel:
        """Pack a linear layer; the codes are not kept. Raises DeviceError for groups that no kernel multiplies."""
        packed = self._empty_like(1, weight)
        packed.set_expert(0, weight.codes, weight.scales, weight.zeros)
        return partial(linear, weight=packed, bias=bias, num_outputs=num_outputs)

    def pack_experts(
        self, experts: Iterable[QuantizedExpert], dtype: torch.dtype, *, num_experts: int, activation: Activation
    ) -> ExpertsKernel:
        """Pack the experts one by one, with the rows of gate and up interleaved; the codes are not kept.

        Raises DeviceError for groups that no kernel multiplies, and for a part of the experts that cannot be
        interleaved.
        """
        up: PackedWeight | None = None
        down: PackedWeight | None = None
        up_bias: Tensor | None = None
        down_bias: Tensor | None = None
        index, is_gated = 0, activation.is_gated
        for expert in experts:
            if up is None or down is None:
                if is_gated:
                    check_gate(expert.up.shape[0] // 2, self._communicator)
                up, down = (self._empty_like(num_experts, weight) for weight in (expert.up, expert.down))
                up_bias = _stacked_like(num_experts, expert.up_bias)
                down_bias = _stacked_like(num_experts, expert.down_bias)
            parts = (expert.up.codes, expert.up.scales, expert.up.zeros)
            up.set_expert(index, *(_interleaved(part) for part in parts) if is_gated else parts)
            down.set_expert(index, expert.down.codes, expert.down.scales, expert.down.zeros)
            if up_bias is not None and expert.up_bias is not None:
                bias = expert.up_bias[:, None]
                up_bias[index, :, None] = interleave(*bias.chunk(2)) if is_gated else bias
            if down_bias is not None and expert.down_bias is not None:
                down_bias[index] = expert.down_bias
            index += 1
        assert up is not None and down is not None and index == num_experts, f"{index} of {num_experts} experts"
        return partial(
            run_experts,
            up=up,
            down=down,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=activation,
            gather=gather_of(self._communicator),
        )

    def _empty_like(self, num_experts: int, weight: QuantizedWeight) -> PackedWeight:
        sizes = Sizes(num_experts, *weight.shape)
        format = self._fp8 if weight.kind == "fp8" else weight.kind
        has_zeros = weight.zeros is not None
        try:
            return empty_packed(sizes, format, weight.group_size, has_zeros=has_zeros, device=weight.codes.device)
        except ValueError as error:
            raise DeviceError(f"The GPU cannot run this model: {error}. Use device: cpu.") from None


def _interleaved(part: Tensor | None) -> Tensor | None:
    """Interleave what there is for each row, gate first. part: [2 * intermediate_size, ..]"""
    return None if part is None else interleave(*part.chunk(2))


def _stacked_like(num_experts: int, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.empty(num_experts, *bias.shape, dtype=bias.dtype, device=bias.device)
