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

from moray.kernels.cpu import product, tiles
from moray.kernels.cpu import vector_product as vectors
from moray.kernels.cpu.epilogue import apply_epilogue, encode
from moray.kernels.cpu.huge_pages import allocate, collapse
from moray.kernels.cpu.numba_intrinsics import CFunction, array, array_at, compiled, narrow, widen
from moray.kernels.cpu.thread_pool import is_large_product, num_cores
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
# Distance from the weights in use to those that are prefetched. Vectors of 256 bits pass over the columns of 16 KB in
# groups, so what they prefetch must not be in the same 16 KB.
AHEAD_BYTES, AHEAD_BYTES_256 = 8192, 32768

# What this kernel's description of a weight has of its own: addresses of panels and bias, and the steps of a panel.
PANELS, STEPS, BIAS = product.OWN, product.OWN + 1, product.OWN + 2

NO_BIAS = np.empty(0, np.float32)


def pack_panels(weight: Tensor) -> Tensor:
    """Pack a weight, [out_features, in_features], as [panels, in_features / n, PANEL, n] in huge pages.

    n is the number of inputs in 32 bits. The weight is padded with zeros to whole panels and to a multiple of INPUTS.
    """
    out_features, in_features = weight.shape
    if in_features % INPUTS or out_features % PANEL:
        weight = F.pad(weight, (0, -in_features % INPUTS, 0, -out_features % PANEL))
    words = weight.contiguous().view(torch.int32)
    by_panel = words.view(-1, PANEL, words.shape[1]).transpose(1, 2)
    packed = allocate(words.nbytes).view(torch.int32).view(by_panel.shape)
    packed.copy_(by_panel)
    collapse(packed.data_ptr(), packed.nbytes)
    return packed.view(weight.dtype).view(*by_panel.shape, 4 // weight.element_size())


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _multiply_panels(
    multiply: Any,
    ahead_bytes: int,
    w: Any,
    x: Any,
    bias: Any,
    activation: int,
    times: Any,
    y: Any,
    start: int,
    stop: int,
) -> None:
    """Compute the columns of y that belong to the panels start .. stop - 1.

    multiply: an intrinsic of vector_product.py
    ahead_bytes: distance from the weights in use to those that are prefetched
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
                ahead = block_w + uint64(ahead_bytes)
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
    _multiply_panels(vectors.multiply_bf16, AHEAD_BYTES, w, x, bias, activation, times, y, start, stop)


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
    _multiply_panels(vectors.multiply_bf16_512, AHEAD_BYTES, w, x, bias, activation, times, y, start, stop)


@compiled
def _bf16_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_bf16_256, AHEAD_BYTES_256, w, x, bias, activation, times, y, start, stop)


@compiled
def _f16_512(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_f16_512, AHEAD_BYTES, w, x, bias, activation, times, y, start, stop)


@compiled
def _f16_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_f16_256, AHEAD_BYTES_256, w, x, bias, activation, times, y, start, stop)


@compiled
def _fp32_512(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_fp32_512, AHEAD_BYTES, w, x, bias, activation, times, y, start, stop)


@compiled
def _fp32_256(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    _multiply_panels(vectors.multiply_fp32_256, AHEAD_BYTES_256, w, x, bias, activation, times, y, start, stop)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _arrays(weight: Any, call: Any, stored: Any, reads: Any) -> Any:
    """Return a kernel's arguments from what product.py describes, up to `start`.

    stored: the type in which the numbers of weights, x and y are stored
    reads:  the type in which the kernel reads x
    """
    of_weight = array_at(weight, (BIAS + 1,), np.uint64)
    of_call = array_at(call, (product.CALL_WORDS,), np.uint64)
    inputs = 4 // np.int64(of_weight[product.ITEM_BYTES])  # per step
    num_panels, num_steps = np.int64(of_weight[product.NUM_PANELS]), np.int64(of_weight[STEPS])
    num_rows, out_features = np.int64(of_call[product.NUM_ROWS]), np.int64(of_weight[product.OUT_FEATURES])
    has_bias, has_times = np.int64(of_weight[BIAS] != uint64(0)), np.int64(of_call[product.TIMES] != uint64(0))
    w = array_at(of_weight[PANELS], (num_panels, num_steps, PANEL, inputs), stored)
    x = array_at(of_call[product.X], (num_rows, num_steps * inputs), reads)
    bias = array_at(of_weight[BIAS], (out_features * has_bias,), np.float32)
    times = array_at(of_call[product.TIMES], (num_rows, out_features * has_times), stored)
    y = array_at(of_call[product.Y], (num_rows, out_features), stored)
    return w, x, bias, np.int64(of_call[product.ACTIVATION]), times, y


def _run_amx_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.uint16, np.uint16)
    _bf16_tiles(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx512_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.uint16, np.uint16)
    _bf16(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx512_of_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.uint16, np.float32)
    _bf16_512(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx512_of_f16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.int16, np.float32)
    _f16_512(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx512_of_fp32(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.float32, np.float32)
    _fp32_512(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx2_of_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.uint16, np.float32)
    _bf16_256(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx2_of_f16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.int16, np.float32)
    _f16_256(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


def _run_avx2_of_fp32(weight: Any, call: Any, start: Any, stop: Any) -> None:
    w, x, bias, activation, times, y = _arrays(weight, call, np.float32, np.float32)
    _fp32_256(w, x, bias, activation, times, y, np.int64(start), np.int64(stop))


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _prepare(weight: Any, call: Any, start: Any, stop: Any, stored: Any, reads: Any) -> None:
    """Convert rows from `stored` to `reads`, and pad them with zeros to whole steps."""
    of_call = array_at(call, (product.CALL_WORDS,), np.uint64)
    num_rows = of_call[product.NUM_ROWS]
    of_weight = array_at(weight, (STEPS + 1,), np.uint64)
    in_features = of_weight[product.IN_FEATURES]
    width = of_weight[STEPS] * (uint64(4) // of_weight[product.ITEM_BYTES])
    rows = array_at(of_call[product.X], (num_rows, in_features), stored)
    out = array_at(of_call[product.Y], (num_rows, width), reads)
    for row in range(start, stop):
        for i in range(in_features):
            out[row, i] = narrow(widen(rows[row, i]), out[row, i])
        out[row, in_features:] = 0


def _pad_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    _prepare(weight, call, start, stop, np.uint16, np.uint16)


def _widen_bf16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    _prepare(weight, call, start, stop, np.uint16, np.float32)


def _widen_f16(weight: Any, call: Any, start: Any, stop: Any) -> None:
    _prepare(weight, call, start, stop, np.int16, np.float32)


def _pad_fp32(weight: Any, call: Any, start: Any, stop: Any) -> None:
    _prepare(weight, call, start, stop, np.float32, np.float32)


_PREPARE = {
    (torch.bfloat16, torch.bfloat16): CFunction(_pad_bf16),
    (torch.bfloat16, torch.float32): CFunction(_widen_bf16),
    (torch.float16, torch.float32): CFunction(_widen_f16),
    (torch.float32, torch.float32): CFunction(_pad_fp32),
}


@dataclass(frozen=True)
class Kernel:
    """Describes a compiled kernel.

    run:    computes some panels from arrays, see _multiply_panels
    reads:  the type in which it reads x
    entry:  the same as a C function, see product.py; None if it can only be called from Python
    """

    run: Callable[..., None]
    reads: torch.dtype
    entry: CFunction | None = None


# (instruction set, dtype of x, weights and result) -> kernel
KERNELS = {
    ("amx", torch.bfloat16): Kernel(_bf16_tiles, torch.bfloat16, CFunction(_run_amx_bf16)),
    ("avx512_bf16", torch.bfloat16): Kernel(_bf16, torch.bfloat16, CFunction(_run_avx512_bf16)),
    ("avx512", torch.bfloat16): Kernel(_bf16_512, torch.float32, CFunction(_run_avx512_of_bf16)),
    ("avx512", torch.float16): Kernel(_f16_512, torch.float32, CFunction(_run_avx512_of_f16)),
    ("avx512", torch.float32): Kernel(_fp32_512, torch.float32, CFunction(_run_avx512_of_fp32)),
    ("avx2", torch.bfloat16): Kernel(_bf16_256, torch.float32, CFunction(_run_avx2_of_bf16)),
    ("avx2", torch.float16): Kernel(_f16_256, torch.float32, CFunction(_run_avx2_of_f16)),
    ("avx2", torch.float32): Kernel(_fp32_256, torch.float32, CFunction(_run_avx2_of_fp32)),
}


def describe(kernel: Kernel, panels: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Any:
    """Return the description of a weight from pack_panels for product.py, which both tensors must outlive.

    bias: [out_features] fp32, or None
    """
    assert kernel.entry is not None
    num_panels, num_steps, _, inputs = panels.shape
    reads_as_it_is = kernel.reads == panels.dtype and in_features == num_steps * inputs
    return product.describe(
        kernel.entry,
        None if reads_as_it_is else _PREPARE[panels.dtype, kernel.reads],
        row_bytes=num_steps * inputs * kernel.reads.itemsize,
        num_panels=num_panels,
        panel_bytes=num_steps * STEP_BYTES,
        out_features=out_features,
        in_features=in_features,
        item_bytes=panels.itemsize,
        own=(panels.data_ptr(), num_steps, 0 if bias is None else bias.data_ptr()),
    )


def multiply(
    kernel: Kernel,
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    times: Tensor | None,
    limit: float = 0.0,
) -> Tensor:
    """Return activation(x @ weight.T + bias) * times, rounded once, for a weight from pack_panels.

    A kernel without an entry is called once, for all panels.

    bias: [out_features] fp32, or None
    """
    if kernel.entry is not None:
        weight = describe(kernel, panels, bias, out_features, x.shape[1])
        return product.multiply(x, weight.ctypes.data, out_features, activation, times, limit)
    y = x.new_empty(x.shape[0], out_features)
    rows = F.pad(x.to(kernel.reads), (0, panels.shape[1] * panels.shape[3] - x.shape[1]))
    out = array(y)
    kernel.run(
        array(panels),
        array(rows),
        NO_BIAS if bias is None else array(bias),
        encode(activation, limit),
        out[:, :0] if times is None else array(times.contiguous()),
        out,
        0,
        len(panels),
    )
    return y


def split_work(num_tokens: int, num_panels: int, num_weights: int, num_bytes: int) -> list[int]:
    """Split the panels into pieces of work; return the first panel of each piece, and the end of the last piece."""
    pieces = 1
    if num_cores() > 1 and is_large_product(num_tokens, num_weights):
        by_size = num_bytes // product.PIECE_BYTES
        pieces = min(num_panels, max(num_cores(), min(by_size, product.PIECES_PER_CORE * num_cores())))
    return [num_panels * i // pieces for i in range(pieces + 1)]
