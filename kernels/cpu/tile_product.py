"""Multiply rows with panels of 64 bf16 weights on AMX tiles.

The sums of 16 x 16 results stay in a tile until all inputs are added. The order of the inputs is the same whatever the
rows, the number of rows and the number of threads.
"""

from typing import Any

import numba
import numpy as np
from numba import uint64

from moray.kernels.cpu.epilogue import apply_epilogue
from moray.kernels.cpu.tiles import CONFIG_BYTES, TILE_BYTES, TILE_ROWS, shape_tile
from moray.kernels.cpu.vector_product import PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import address_of, prefetch

BLOCK_ROWS = 2 * TILE_ROWS  # rows that are multiplied together
BLOCK_BYTES = TILE_ROWS * STEP_BYTES  # bytes of a panel's weights for as many inputs as a tile is wide
AHEAD_BYTES = 8192  # distance from the weights in use to those that are prefetched, if a panel is read only once


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_tiles(
    configure: Any,
    zero: Any,
    read: Any,
    dot: Any,
    write: Any,
    release: Any,
    file: Any,
    w: Any,
    x: Any,
    bias: Any,
    activation: int,
    times: Any,
    y: Any,
    start: int,
    stop: int,
) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1, with the given tile operations.

    w:     [panels, steps, PANEL, 2] bf16 in the layout of pack_panels; steps is a multiple of TILE_ROWS
    x:     [num_tokens, 2 * steps] bf16
    bias, times, y: see epilogue.apply_epilogue
    """
    num_rows, panel_bytes = len(y), w.shape[1] * STEP_BYTES
    num_blocks = w.shape[1] // TILE_ROWS
    stride = uint64(x.shape[1] * x.itemsize)
    sums = np.empty((BLOCK_ROWS, PANEL), np.float32)
    config = np.zeros(CONFIG_BYTES, np.uint8)
    # A block of up to 16 rows is multiplied with all columns at once, a larger block with one half after the other.
    last = num_rows % BLOCK_ROWS
    passes = num_rows // BLOCK_ROWS * 2 + (0 if last == 0 else 1 if last <= TILE_ROWS else 2)
    lines = BLOCK_BYTES // 64 // passes + (1 if BLOCK_BYTES // 64 % passes else 0)  # to prefetch per tile of x
    distance = AHEAD_BYTES if passes == 1 else panel_bytes
    shaped = 0
    for panel in range(start, stop):
        panel_w = address_of(w) + uint64(panel * panel_bytes)
        ahead = panel_w + uint64(distance)
        end = ahead + uint64(panel_bytes)
        for first in range(0, num_rows, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, num_rows - first)
            if rows != shaped:
                _shape(config, rows)
                configure(file, address_of(config))
                shaped = rows
            upper = address_of(x) + uint64(first) * stride
            lower = upper + uint64(TILE_ROWS) * stride
            target = address_of(sums)
            target_lower = target + uint64(TILE_ROWS * STEP_BYTES)
            if rows <= TILE_ROWS:
                zero(file, 0)
                zero(file, 1)
                zero(file, 2)
                zero(file, 3)
                for block in range(num_blocks):
                    ahead = prefetch_lines(ahead, end, lines)
                    at = panel_w + uint64(block * BLOCK_BYTES)
                    read(file, 4, upper + uint64(block * TILE_BYTES), stride)
                    read(file, 6, at, uint64(STEP_BYTES))
                    dot(file, 0, 4, 6)
                    read(file, 7, at + uint64(TILE_BYTES), uint64(STEP_BYTES))
                    dot(file, 1, 4, 7)
                    read(file, 6, at + uint64(2 * TILE_BYTES), uint64(STEP_BYTES))
                    dot(file, 2, 4, 6)
                    read(file, 7, at + uint64(3 * TILE_BYTES), uint64(STEP_BYTES))
                    dot(file, 3, 4, 7)
                write(file, 0, target, uint64(STEP_BYTES))
                write(file, 1, target + uint64(TILE_BYTES), uint64(STEP_BYTES))
                write(file, 2, target + uint64(2 * TILE_BYTES), uint64(STEP_BYTES))
                write(file, 3, target + uint64(3 * TILE_BYTES), uint64(STEP_BYTES))
            else:
                for half in range(0, STEP_BYTES, 2 * TILE_BYTES):
                    zero(file, 0)
                    zero(file, 1)
                    zero(file, 2)
                    zero(file, 3)
                    for block in range(num_blocks):
                        ahead = prefetch_lines(ahead, end, lines)
                        at = panel_w + uint64(block * BLOCK_BYTES + half)
                        read(file, 4, upper + uint64(block * TILE_BYTES), stride)
                        read(file, 6, at, uint64(STEP_BYTES))
                        dot(file, 0, 4, 6)
                        read(file, 7, at + uint64(TILE_BYTES), uint64(STEP_BYTES))
                        dot(file, 1, 4, 7)
                        read(file, 5, lower + uint64(block * TILE_BYTES), stride)
                        dot(file, 2, 5, 6)
                        dot(file, 3, 5, 7)
                    write(file, 0, target + uint64(half), uint64(STEP_BYTES))
                    write(file, 1, target + uint64(half + TILE_BYTES), uint64(STEP_BYTES))
                    write(file, 2, target_lower + uint64(half), uint64(STEP_BYTES))
                    write(file, 3, target_lower + uint64(half + TILE_BYTES), uint64(STEP_BYTES))
            apply_epilogue(sums, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(rows))
    release(file)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _shape(config: Any, rows: int) -> None:
    """Configure the tiles for a block of rows: tiles 0..3 hold sums, 4 and 5 rows of x, 6 and 7 weights."""
    upper = min(rows, TILE_ROWS)
    lower = rows - TILE_ROWS if rows > TILE_ROWS else upper  # up to 16 rows keep all their sums in the upper half
    shape_tile(config, 0, upper)
    shape_tile(config, 1, upper)
    shape_tile(config, 2, lower)
    shape_tile(config, 3, lower)
    shape_tile(config, 4, upper)
    shape_tile(config, 5, lower)
    shape_tile(config, 6, TILE_ROWS)
    shape_tile(config, 7, TILE_ROWS)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def prefetch_lines(ahead: Any, end: Any, lines: int) -> Any:
    """Prefetch up to `lines` cache lines, but none beyond `end`; return the next address to prefetch."""
    for _ in range(lines):
        if ahead < end:
            prefetch(ahead)
            ahead += uint64(64)
    return ahead
