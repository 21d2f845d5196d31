"""Prepare rows for products with quantized weights: as integers of 16 bits with one scale a row, or in fp32.

A prepared row is padded with zeros to the weight's inputs. Integers lie in two planes of signed bytes, so that a row is
xs * (256 * upper + lower). Preparing a row does not depend on the other rows.
"""

from typing import Any

import numpy as np
from numba import float32, int8, int32, uint16, uint64

from moray.kernels.cpu.numba_intrinsics import as_bits, compiled, widen

LARGEST = 127 * 256  # largest integer of a row: its upper plane is at most 127 then
SMALLEST = 2.0**-110  # a row without a larger number counts as zeros: its scale would be no normal number
ROUNDER = 1.5 * 2**23  # adding it to a smaller fp32 number rounds to a whole one, ties to even
ROUNDER_BITS = 0x4B400000
INFINITY_BITS = 0x7F800000


@compiled
def quantize_rows(x: Any, group_inputs: int, xq: Any, xs: Any, plane_sums: Any, start: int, stop: int) -> None:
    """Write the rows start .. stop - 1 of x as integers. A row with an infinity or a NaN gets the scale NaN.

    x:          [num_tokens, in_features] bf16
    xq:         [2 * num_tokens, padded in_features] int8: the upper plane of the first row, its lower plane, ...
    xs:         [num_tokens] fp32, the rows' scales
    plane_sums: [2 * num_tokens, groups] int32, the negative sum of each plane in each group of `group_inputs`
    """
    width, padded = uint64(x.shape[1]), uint64(xq.shape[1])
    for row in range(start, stop):
        bits = uint16(0)
        for k in range(width):
            bits = max(bits, uint16(x[row, k] & uint16(0x7FFF)))
        largest = widen(bits)
        is_finite = as_bits(largest) < INFINITY_BITS
        inverse = float32(LARGEST) / largest if is_finite and largest >= float32(SMALLEST) else float32(0.0)
        xs[row] = largest / float32(LARGEST) if is_finite else float32(np.nan)
        upper_row, lower_row = uint64(2 * row), uint64(2 * row + 1)
        for k in range(width):
            number = widen(x[row, k]) * inverse if is_finite else float32(0.0)
            code = int32(as_bits(number + float32(ROUNDER))) - int32(ROUNDER_BITS)
            upper = (code + int32(128)) >> int32(8)
            xq[upper_row, k] = int8(upper)
            xq[lower_row, k] = int8(code - (upper << int32(8)))
        for k in range(width, padded):
            xq[upper_row, k] = int8(0)
            xq[lower_row, k] = int8(0)
        for plane in range(upper_row, lower_row + uint64(1)):
            for group in range(plane_sums.shape[1]):
                begin = uint64(group * group_inputs)
                end = min(begin + uint64(group_inputs), padded)
                total = int32(0)
                for k in range(begin, end):
                    total -= int32(xq[plane, k])
                plane_sums[plane, group] = total


@compiled
def widen_rows(x: Any, group_inputs: int, xq: Any, xs: Any, plane_sums: Any, start: int, stop: int) -> None:
    """Write the rows start .. stop - 1 of x in fp32, with scales of 1; plane_sums are not used.

    x:  [num_tokens, in_features]
    xq: [num_tokens, padded in_features] fp32
    xs: [num_tokens] fp32
    """
    width, padded = uint64(x.shape[1]), uint64(xq.shape[1])
    for row in range(start, stop):
        xs[row] = float32(1.0)
        for k in range(width):
            xq[row, k] = widen(x[row, k])
        for k in range(width, padded):
            xq[row, k] = float32(0.0)
