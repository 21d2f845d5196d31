"""Quantize weights while they are loaded. Every step is rounded as IEEE 754 says: codes are the same on every device.

int8:  one scale a row, max / 127; code = w / scale, rounded half to even
int4:  one scale a group of inputs, max / 7 rounded to bfloat16; code = w / scale, rounded half to even, from -8 to 7
fp8:   one scale a row, max / 448; code = w / scale, rounded half to even to float8_e4m3fn

A change of any of these needs another VERSION, which is part of a job's fingerprint.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moray.engine.errors import CheckpointError
from moray.engine.float_dtypes import WIDER_STORED_FLOATS
from moray.engine.quantization.scheme import Scheme, WeightKind
from moray.engine.quantization.stored_part import StoredPart
from moray.engine.quantization.weight import CODE_DTYPES, QuantizedWeight
from moray.kernels.cpu.thread_pool import parallel_for, single_threaded

LARGEST_CODE: dict[WeightKind, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
# Elements that are processed at a time: as float32 they stay in a core's cache from one step to the next. A GPU has
# little to gain from that, and a call costs it more.
CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 24


class OnLoad:
    """Reads a checkpoint of floats and quantizes its weights while they are loaded; a StoredFormat."""

    is_read_by_rows = True

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self.extras: re.Pattern[str] | None = None

    def parts(self, module: str, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
        """Return the one stored tensor, whose dtype may be any float's."""
        return {f"{module}.weight": StoredPart(shape, WIDER_STORED_FLOATS)}

    def assemble(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Quantize the weight as it is stored, so that its codes do not depend on the dtype that the model runs in.

        Raises CheckpointError if a value is infinite or no number.
        """
        try:
            return quantize(tensors[f"{module}.weight"], self._scheme.kind, self._scheme.group_size)
        except ValueError as error:
            raise CheckpointError(f"{module}.weight {error}; {self._scheme.kind} has no code for that.") from None


def quantize(weight: Tensor, kind: WeightKind, group_size: int | None = None) -> QuantizedWeight:
    """Quantize a weight, symmetrically.

    weight:      [out_features, in_features], any float dtype
    group_size:  inputs that share a scale; None = one scale a row

    Raises ValueError if a value is infinite or no number.
    """
    out_features, in_features = weight.shape
    size = min(group_size or in_features, in_features)
    whole = in_features // size * size
    codes = torch.empty_like(weight, dtype=CODE_DTYPES[kind])
    scales = torch.empty(out_features, -(-in_features // size), dtype=torch.float32, device=weight.device)
    is_on_cpu = weight.device.type == "cpu"
    num_rows = max(1, (CPU_CHUNK if is_on_cpu else GPU_CHUNK) // in_features)

    def quantize_chunk(first: int) -> None:
        rows = slice(first, first + num_rows)
        values = weight[rows].to(torch.float32, copy=True)
        _quantize_groups(values[:, :whole], kind, size, codes[rows, :whole], scales[rows, : whole // size])
        if whole < in_features:
            _quantize_groups(values[:, whole:], kind, in_features - whole, codes[rows, whole:], scales[rows, -1:])

    firsts = range(0, out_features, num_rows)
    if is_on_cpu:  # each core takes chunks: if all shared each operation, a busy core would be waited for in each
        with single_threaded():
            parallel_for(quantize_chunk, firsts)
    else:
        for first in firsts:
            quantize_chunk(first)
    if not scales.isfinite().all():
        raise ValueError("has a value that is infinite or no number")
    return QuantizedWeight(kind, codes, scales, size)


def _quantize_groups(values: Tensor, kind: WeightKind, size: int, codes: Tensor, scales: Tensor) -> None:
    """Quantize columns that are whole groups, and write their codes and scales. values: fp32, overwritten"""
    groups = values.view(len(values), -1, size)
    least, largest = groups.aminmax(dim=2)
    # A division by a number would multiply by its reciprocal on a GPU, which rounds differently.
    scale = torch.maximum(largest, -least) / torch.full_like(largest, LARGEST_CODE[kind])
    if kind == "int4":
        scale = scale.bfloat16().float()
    scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 1.0)  # zeros, whose codes are 0
    scales.copy_(scale)
    groups.div_(scale.unsqueeze(2))
    if kind == "fp8":
        groups.clamp_(-LARGEST_CODE[kind], LARGEST_CODE[kind])
    else:
        groups.round_()
        if kind == "int4":
            groups.clamp_(-8, 7)
    codes.copy_(values)
