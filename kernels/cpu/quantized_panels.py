"""Pack quantized weights in panels of 64 output features for the kernels of quantized_product.py."""

from typing import Any

import torch
import torch.nn.functional as F
from numba import uint32, uint64
from torch import Tensor

from moray.kernels.cpu.huge_pages import allocate, collapse
from moray.kernels.cpu.numba_intrinsics import array, compiled
from moray.kernels.cpu.thread_pool import num_cores, parallel_for
from moray.kernels.cpu.vector_product import PANEL
from moray.kernels.e2m1 import VALUES

INPUTS = 64  # the number of inputs of a panel is padded to a multiple of this, the inputs of a tile
PACKED_AT_ONCE = 16  # words of each output that are packed together: a cache line

INT8, INT4, FP8, FP4 = range(4)
KINDS = {"int8": INT8, "int4": INT4, "fp8": FP8, "fp4": FP4}
STEP_INPUTS = {"int8": 4, "int4": 8, "fp8": 4, "fp4": 8}  # inputs in a word of 32 bits
# What codes are multiplied as more than they are, so that they are unsigned. Those of fp4 are looked up in INTEGERS,
# because twice the numbers that they stand for are whole.
ZERO = {"int8": 128, "int4": 8, "fp8": 0, "fp4": 12}
INTEGERS = tuple(int(2 * value) + ZERO["fp4"] for value in VALUES)


def pack_codes(codes: Tensor, kind: str) -> Tensor:
    """Return codes, [out_features, in_features] in bytes, as [panels, steps, PANEL, 4] uint8 in huge pages.

    A word of 32 bits holds STEP_INPUTS inputs of an output. Outputs are padded to whole panels, and inputs to a
    multiple of INPUTS, with codes that no result depends on.
    """
    out_features, in_features = codes.shape
    codes = codes.view(torch.int8)
    if in_features % INPUTS:
        codes = F.pad(codes, (0, -in_features % INPUTS))
    panels, steps = -(-out_features // PANEL), codes.shape[1] // STEP_INPUTS[kind]
    packed = allocate(panels * steps * PANEL * 4).view(panels, steps, PANEL, 4)
    words = array(codes.contiguous()).view("uint32")
    out = array(packed).view("uint32").reshape(panels, steps, PANEL)
    pieces = min(panels, 4 * num_cores())
    bounds = [panels * i // pieces for i in range(pieces + 1)]
    parallel_for(lambda i: _pack(words, KINDS[kind], out, bounds[i], bounds[i + 1]), range(pieces))
    collapse(packed.data_ptr(), packed.nbytes)
    return packed


@compiled
def _pack(words: Any, kind: int, out: Any, start: int, stop: int) -> None:
    """Pack the panels start .. stop - 1. words: [out_features, in_features / 4] uint32; out: [panels, steps, PANEL]"""
    num_words = uint64(words.shape[1])
    for panel in range(start, stop):
        outputs = min(PANEL, words.shape[0] - panel * PANEL)
        for output in range(outputs, PANEL):
            for step in range(out.shape[1]):
                out[panel, step, output] = uint32(0)
        for begin in range(uint64(0), num_words, uint64(PACKED_AT_ONCE)):
            for output in range(outputs):
                row = panel * PANEL + output
                for at in range(begin, min(begin + uint64(PACKED_AT_ONCE), num_words)):
                    if kind == INT8:
                        out[panel, at, output] = words[row, at] ^ uint32(0x80808080)
                    elif kind == FP8:
                        out[panel, at, output] = words[row, at]
                    elif at % uint64(2) == 0:
                        lower = words[row, at] & uint32(0x0F0F0F0F)
                        upper = words[row, at + uint64(1)] & uint32(0x0F0F0F0F)
                        shift = uint32(0x88888888) if kind == INT4 else uint32(0)
                        out[panel, at // uint64(2), output] = (lower | upper << uint32(4)) ^ shift


def pack_by_group(numbers: Tensor) -> Tensor:
    """Return numbers, [out_features, groups], as [panels, groups, PANEL], padded with zeros."""
    padded = F.pad(numbers, (0, 0, 0, -numbers.shape[0] % PANEL))
    return padded.view(-1, PANEL, numbers.shape[1]).transpose(1, 2).contiguous()


def unpack_codes(packed: Tensor, kind: str) -> Tensor:
    """Return codes from pack_codes as fp32, [panels * PANEL, padded in_features], with nothing subtracted."""
    if STEP_INPUTS[kind] == 8:
        packed = torch.cat((packed & 15, packed >> 4), -1)
    by_output = packed.transpose(1, 2).flatten(2).flatten(0, 1)
    if kind == "fp8":
        return by_output.contiguous().view(torch.float8_e4m3fn).float()
    if kind == "fp4":
        return torch.tensor(INTEGERS, dtype=torch.float32)[by_output.int()]
    return by_output.float()
