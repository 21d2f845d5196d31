"""Multiply rows with panels of 64 codes of 8 bits on AMX tiles.

The sums are the integers that quantized_product.py computes, and the rest is done in its order, so a row has the same
bits by either. All inputs must share a scale: writing the tiles after each group would take longer than multiplying.
"""

from typing import Any

import numba
import numpy as np
from numba import float32, int32, uint64

from moray.kernels.cpu.epilogue import apply_epilogue
from moray.kernels.cpu.numba_intrinsics import fma
from moray.kernels.cpu.quantized_product import PLANES
from moray.kernels.cpu.tile_product import BLOCK_BYTES, prefetch_lines
from moray.kernels.cpu.tiles import CONFIG_BYTES, TILE_BYTES, TILE_ROWS, shape_tile
from moray.kernels.cpu.vector_product import PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import address_of


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_quantized_tiles(
    configure: Any,
    clear: Any,
    read: Any,
    dot: Any,
    write: Any,
    release: Any,
    file: Any,
    zero: int,
    weight: Any,
    rows: Any,
    result: Any,
    start: int,
    stop: int,
) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1, with the given tile operations.

    The rest is as for multiply_quantized, with one group, and steps that are a multiple of TILE_ROWS.
    """
    w, scales, zeros, _, _ = weight
    xq, xs, plane_sums = rows
    bias, activation, times, y = result
    num_rows, panel_bytes = len(y), w.shape[1] * STEP_BYTES
    num_blocks = w.shape[1] // TILE_ROWS
    plane_bytes = uint64(xq.shape[1])
    row_bytes, row_sums = uint64(PLANES) * plane_bytes, uint64(PLANES * STEP_BYTES)
    sums, total = np.empty((TILE_ROWS * PLANES, PANEL), np.int32), np.empty((TILE_ROWS, PANEL), np.float32)
    config = np.zeros(CONFIG_BYTES, np.uint8)
    passes = 2 * ((num_rows + TILE_ROWS - 1) // TILE_ROWS)  # over a panel; each prefetches a part of the next one
    lines = (BLOCK_BYTES // 64 + passes - 1) // passes
    shaped = 0
    for panel in range(start, stop):
        panel_w = address_of(w) + uint64(panel * panel_bytes)
        ahead = panel_w + uint64(panel_bytes)
        end = ahead + uint64(panel_bytes)
        for first in range(0, num_rows, TILE_ROWS):
            block_rows = min(TILE_ROWS, num_rows - first)
            if block_rows != shaped:
                _shape(config, block_rows)
                configure(file, address_of(config))
                shaped = block_rows
            upper = address_of(xq) + uint64(first) * row_bytes
            lower = upper + plane_bytes
            for half in range(0, STEP_BYTES, 2 * TILE_BYTES):
                clear(file, 0)
                clear(file, 1)
                clear(file, 2)
                clear(file, 3)
                for block in range(num_blocks):
                    ahead = prefetch_lines(ahead, end, lines)
                    at = panel_w + uint64(block * BLOCK_BYTES + half)
                    read(file, 4, upper + uint64(block * TILE_BYTES), row_bytes)
                    read(file, 6, at, uint64(STEP_BYTES))
                    dot(file, 0, 4, 6)
                    read(file, 7, at + uint64(TILE_BYTES), uint64(STEP_BYTES))
                    dot(file, 1, 4, 7)
                    read(file, 5, lower + uint64(block * TILE_BYTES), row_bytes)
                    dot(file, 2, 5, 6)
                    dot(file, 3, 5, 7)
                target = address_of(sums) + uint64(half)
                write(file, 0, target, row_sums)
                write(file, 1, target + uint64(TILE_BYTES), row_sums)
                write(file, 2, target + uint64(STEP_BYTES), row_sums)
                write(file, 3, target + uint64(STEP_BYTES + TILE_BYTES), row_sums)
            for row in range(uint64(block_rows)):
                scale_of_row = xs[uint64(first) + row]
                plane = uint64(PLANES) * (uint64(first) + row)
                upper_sum, lower_sum = plane_sums[plane, 0], plane_sums[plane + uint64(1), 0]
                upper_sums, lower_sums = sums[uint64(PLANES) * row], sums[uint64(PLANES) * row + uint64(1)]
                for column in range(uint64(PANEL)):
                    shift = int32(zeros[panel, 0, column]) if zeros.shape[0] > 0 else int32(zero)
                    above = float32(int32(upper_sums[column] + int32(upper_sum * shift)))
                    below = float32(int32(lower_sums[column] + int32(lower_sum * shift)))
                    product = fma(fma(above, float32(256.0), below), scales[panel, 0, column], float32(0.0))
                    total[row, column] = product * scale_of_row
            apply_epilogue(total, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(block_rows))
    release(file)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _shape(config: Any, rows: int) -> None:
    """Configure the tiles: 0..3 hold sums, 4 and 5 the upper and the lower planes of `rows` rows, 6 and 7 codes."""
    for tile in range(6):
        shape_tile(config, tile, rows)
    shape_tile(config, 6, TILE_ROWS)
    shape_tile(config, 7, TILE_ROWS)
