"""Prepare rows for products with quantized weights: as integers of 16 bits with one scale a row, or in fp32.

A prepared row is padded with zeros to the weight's inputs. Integers lie in two planes of signed bytes, so that a row is
xs * (256 * upper + lower). Preparing a row does not depend on the other rows.
"""

from typing import Any

import numba
import numpy as np
from numba import float32, int8, int16, int32, uint16, uint32, uint64

from moray.kernels.cpu.numba_intrinsics import as_bits, compiled, widen

LARGEST = 127 * 256  # largest integer of a row: its upper plane is at most 127 then
SMALLEST = 2.0**-110  # a row without a larger number counts as zeros: its scale would be no normal number
ROUNDER = 1.5 * 2**23  # adding it to a smaller fp32 number rounds to a whole one, ties to even
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
    shifted = np.empty(x.shape[1], np.uint32)
    for row in range(start, stop):
        bits = uint32(0)
        for k in range(width):
            magnitude = uint32(x[row, k]) & uint32(0x7FFF)
            bits = magnitude if magnitude > bits else bits
        largest = widen(uint16(bits))
        is_finite = as_bits(largest) < uint32(INFINITY_BITS)
        inverse = float32(LARGEST) / largest if is_finite and largest >= float32(SMALLEST) else float32(0.0)
        xs[row] = largest / float32(LARGEST) if is_finite else float32(np.nan)
        # Loops with one array to write are vectorized. The lowest 16 bits of a shifted number are its code.
        for k in range(width):
            shifted[k] = as_bits(widen(x[row, k]) * inverse + float32(ROUNDER))
        upper, lower = xq[2 * row], xq[2 * row + 1]
        for k in range(width):
            upper[k] = int8((shifted[k] + uint32(128)) >> uint32(8))
        for k in range(width):
            lower[k] = int8(shifted[k])
        upper[x.shape[1] :] = int8(0)
        lower[x.shape[1] :] = int8(0)
        for group in range(plane_sums.shape[1]):
            begin = uint64(group * group_inputs)
            end = min(begin + uint64(group_inputs), padded)
            plane_sums[2 * row, group] = -_sum(upper, begin, end)
            plane_sums[2 * row + 1, group] = -_sum(lower, begin, end)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _sum(numbers: Any, begin: Any, end: Any) -> Any:
    total = int32(0)
    for k in range(begin, end):
        total += int32(numbers[k])
    return int32(total)


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


@compiled
def quantize_pairs(x: Any, group_inputs: int, xq: Any, xs: Any, plane_sums: Any, start: int, stop: int) -> None:
    """Write what quantize_rows does, but rows as integers of 16 bits in the order in which pair_product.py reads them.

    xq: [2 * num_tokens, padded in_features] int8, the memory of [num_tokens, padded in_features] int16; of four inputs
        the order is 0, 2, 1, 3
    """
    quantize_rows(x, group_inputs, xq, xs, plane_sums, start, stop)
    padded = uint64(xq.shape[1])
    planes = np.empty((2, xq.shape[1]), np.int8)
    for row in range(start, stop):
        planes[0], planes[1] = xq[2 * row], xq[2 * row + 1]
        pairs = xq[2 * row : 2 * row + 2].reshape(-1).view(np.int16)
        for k in range(uint64(0), padded, uint64(4)):
            for i in range(uint64(4)):
                at = k + (i >> uint64(1)) + uint64(2) * (i & uint64(1))
                pairs[k + i] = (int16(planes[0, at]) << int16(8)) + int16(planes[1, at])
