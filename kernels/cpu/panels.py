"""Matrix products with weights packed in panels of 64 output features, with the inputs in pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import float32, uint64
from torch import Tensor

from moray.kernels.cpu import tiles
from moray.kernels.cpu import vector_product as vectors
from moray.kernels.cpu.epilogue import ACTIVATIONS, apply_epilogue
from moray.kernels.cpu.huge_pages import collapse
from moray.kernels.cpu.numba_intrinsics import array, compiled
from moray.kernels.cpu.thread_pool import is_large_product, num_cores, parallel_for
from moray.kernels.cpu.tile_product import multiply_tiles
from moray.kernels.cpu.vector_product import LINES_PER_STEP, MAX_ROWS, PANEL, STEP_BYTES
from moray.kernels.cpu.vectors import address_of

INPUTS = 32  # the number of inputs of a panel is padded to a multiple of this, a tile's inputs
GROUP_ROWS = 72  # rows whose sums stay in the first-level cache together; a multiple of MAX_ROWS
MAX_MEMORY_BOUND_ROWS = 18  # up to this many rows, a panel is multiplied as fast as it is read from memory
MEMORY_BOUND_STEPS = 64  # steps of a panel per pass in that case: 16 KB, which stay in the first-level cache
# Steps are added up in spans, and then the sums of the spans, so that long sums stay exact. A span is also the part of
# a panel that a pass with many rows reads: 128 KB, which stay in the second-level cache.
SPAN_STEPS = 512
AHEAD_BYTES = 8192  # distance from the weights in use to those that are prefetched

# Cores that other processes use too finish at different times, so the work is split into more pieces than cores, but
# not into pieces below a useful size.
PIECES_PER_CORE = 4
PIECE_BYTES = 2**21  # bytes of weights in a piece

NO_BIAS = np.empty(0, np.float32)


def pack_panels(weight: Tensor) -> Tensor:
    """Pack a weight, [out_features, in_features], as [panels, in_features / n, PANEL, n] in huge pages.

    n is the number of inputs in 32 bits. The weight is padded with zeros to whole panels and to a multiple of INPUTS.
    """
    out_features, in_features = weight.shape
    if in_features % INPUTS or out_features % PANEL:
        weight = F.pad(weight, (0, -in_features % INPUTS, 0, -out_features % PANEL))
    words = weight.contiguous().view(torch.int32)
    by_panel = words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()
    packed = by_panel.view(weight.dtype).view(*by_panel.shape, 4 // weight.element_size())
    collapse(packed.data_ptr(), packed.nbytes)
    return packed


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _multiply_panels(
    multiply: Any, w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int
) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1.

    multiply: an intrinsic of vector_product.py
    w:        [panels, steps, PANEL, n] in the layout of pack_panels
    x:        [num_tokens, in_features], padded to whole steps, in the type that `multiply` reads
    bias:     [out_features] fp32, or empty
    times:    [num_tokens, out_features], or [num_tokens, 0] for no multiplication
    y:        [num_tokens, out_features]
    """
    num_steps = w.shape[1]
    x_row = uint64(x.shape[1] * x.itemsize)
    x_step = x_row // uint64(num_steps)
    steps_per_pass = MEMORY_BOUND_STEPS if len(y) <= MAX_MEMORY_BOUND_ROWS else SPAN_STEPS
    sums, span_sums = np.empty((GROUP_ROWS, PANEL), np.float32), np.empty((GROUP_ROWS, PANEL), np.float32)
    for panel in range(start, stop):
        for first in range(0, len(y), GROUP_ROWS):
            num_rows = min(GROUP_ROWS, len(y) - first)
            num_full = num_rows // MAX_ROWS
            # Each block of rows prefetches a part of the next weights. Only the first group needs that: for later
            # groups the weights are in the cache.
            max_lines = LINES_PER_STEP if num_full <= 1 else 2 if num_full < LINES_PER_STEP else 1
            for step in range(0, num_steps, steps_per_pass):
                steps = min(steps_per_pass, num_steps - step)
                target = sums if step < SPAN_STEPS else span_sums
                if step % SPAN_STEPS == 0:
                    target[:num_rows] = float32(0.0)
                block_w = address_of(w) + uint64((panel * num_steps + step) * STEP_BYTES)
                ahead = block_w + uint64(AHEAD_BYTES)
                to_fetch = LINES_PER_STEP if first == 0 else 0
                for row in range(0, num_rows, MAX_ROWS):
                    rows = min(MAX_ROWS, num_rows - row)
                    lines = min(max_lines, to_fetch) if rows == MAX_ROWS or row == 0 else 0
                    block_x = address_of(x) + uint64(first + row) * x_row + uint64(step) * x_step
                    block_sums = address_of(target) + uint64(row * STEP_BYTES)
                    multiply(uint64(rows), uint64(lines), block_w, block_x, x_row, block_sums, uint64(steps), ahead)
                    ahead += uint64(lines * 64 * steps)
                    to_fetch -= lines
                if step >= SPAN_STEPS and (step + steps == num_steps or (step + steps) % SPAN_STEPS == 0):
                    for row in range(uint64(num_rows)):
                        for column in range(uint64(PANEL)):
                            sums[row, column] += span_sums[row, column]
            apply_epilogue(sums, bias, activation, times, y, uint64(first), uint64(panel * PANEL), uint64(num_rows))


@compiled
def _bf16(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_bf16, w, x, bias, activation, times, y, start, stop)


@compiled
def _bf16_tiles(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    multiply_tiles(
        tiles.configure,
        tiles.zero,
        tiles.read,
        tiles.dot_bf16,
        tiles.write,
        tiles.release,
        uint64(0),
        w,
        x,
        bias,
        activation,
        times,
        y,
        start,
        stop,
    )


@compiled
def _bf16_512(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_bf16_512, w, x, bias, activation, times, y, start, stop)


@compiled
def _bf16_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_bf16_256, w, x, bias, activation, times, y, start, stop)


@compiled
def _f16_512(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_f16_512, w, x, bias, activation, times, y, start, stop)


@compiled
def _f16_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_f16_256, w, x, bias, activation, times, y, start, stop)


@compiled
def _fp32_512(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_fp32_512, w, x, bias, activation, times, y, start, stop)


@compiled
def _fp32_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_fp32_256, w, x, bias, activation, times, y, start, stop)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, and the type in which it reads x."""

    run: Callable[..., None]
    reads: torch.dtype


# (instruction set, dtype of x, weights and result) -> kernel
KERNELS = {
    ("amx", torch.bfloat16): Kernel(_bf16_tiles, torch.bfloat16),
    ("avx512_bf16", torch.bfloat16): Kernel(_bf16, torch.bfloat16),
    ("avx512", torch.bfloat16): Kernel(_bf16_512, torch.float32),
    ("avx512", torch.float16): Kernel(_f16_512, torch.float32),
    ("avx512", torch.float32): Kernel(_fp32_512, torch.float32),
    ("avx2", torch.bfloat16): Kernel(_bf16_256, torch.float32),
    ("avx2", torch.float16): Kernel(_f16_256, torch.float32),
    ("avx2", torch.float32): Kernel(_fp32_256, torch.float32),
}


def multiply(
    kernel: Kernel,
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    times: Tensor | None,
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once, for a weight from pack_panels.

    bias: [out_features] fp32, or None
    """
    y = x.new_empty(x.shape[0], out_features)
    in_features = panels.shape[1] * panels.shape[3]
    rows = x.to(kernel.reads)
    if in_features != x.shape[1]:
        rows = F.pad(rows, (0, in_features - x.shape[1]))
    out = array(y)
    arguments = (
        array(panels),
        array(rows.contiguous()),
        NO_BIAS if bias is None else array(bias),
        ACTIVATIONS[activation],
        out[:, :0] if times is None else array(times.contiguous()),
        out,
    )
    bounds = split_work(x.shape[0], panels.shape[0], panels.numel(), panels.nbytes)
    if len(bounds) == 2:
        kernel.run(*arguments, *bounds)
    else:
        parallel_for(lambda i: kernel.run(*arguments, bounds[i], bounds[i + 1]), range(len(bounds) - 1))
    return y


def split_work(num_tokens: int, num_panels: int, num_weights: int, num_bytes: int) -> list[int]:
    """Split the panels into pieces of work; return the first panel of each piece, and the end of the last piece."""
    pieces = 1
    if num_cores() > 1 and is_large_product(num_tokens, num_weights):
        by_size = num_bytes // PIECE_BYTES
        pieces = min(num_panels, max(num_cores(), min(by_size, PIECES_PER_CORE * num_cores())))
    return [num_panels * i // pieces for i in range(pieces + 1)]
