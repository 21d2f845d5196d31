"""RMSNorm on the CPU, of rows or of their sum with a residual, in one pass over each row."""

from typing import Any

import numba
import numpy as np
import torch
from numba import float32, uint64
from torch import Tensor

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.norms import rms_norm_ref
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, compiled, keep, narrow, widen
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

LANES = 16  # partial sums of a row's squares, which are added up at its end
MIN_SHARED_ELEMENTS = 2**15  # fewer numbers take less time than sharing them among cores


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Divide each row by its root mean square in fp32, round to x's dtype, then scale (in that order, as Mixtral does).

    x:            [num_tokens, hidden_size], contiguous
    weight:       [hidden_size]
    rounds_last:  scale in fp32 and then round, as gpt-oss does
    """
    normed = torch.empty_like(x)
    _launch(x, None, weight, x, normed, 1.0, eps, rounds_last)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x * multiplier + residual, rounded once, and its rms_norm.

    residual: [num_tokens, hidden_size], contiguous
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, total, normed, multiplier, eps, rounds_last)
    return total, normed


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor,
    normed: Tensor,
    multiplier: float,
    eps: float,
    rounds_last: bool,
) -> None:
    assert x.is_contiguous() and (residual is None or residual.is_contiguous()), "norms read contiguous rows"
    assert weight.dtype == x.dtype, f"rows of {x.dtype} and a weight of {weight.dtype}"
    cores = num_cores()
    _run(
        pool_of(cores),
        cores if x.numel() >= MIN_SHARED_ELEMENTS else 1,
        _RMS_NORM[x.dtype].address,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        x.shape[0],
        x.shape[1],
        rounds_last,
        multiplier,
        eps,
    )


# The arguments of the pieces: addresses, then sizes.
X, RESIDUAL, WEIGHT, TOTAL, NORMED, NUMBERS, NUM_TOKENS, SIZE, ROUNDS_LAST, PIECES = range(10)
WORDS = 10
MULTIPLIER, EPS = 0, 1  # of the fp32 numbers


@compiled
def _run(
    pool: int,
    pieces: int,
    piece: int,
    x: int,
    residual: int,
    weight: int,
    total: int,
    normed: int,
    num_tokens: int,
    size: int,
    rounds_last: bool,
    multiplier: float,
    eps: float,
) -> None:
    words, numbers = np.empty(WORDS, np.uint64), np.empty(2, np.float32)
    numbers[MULTIPLIER], numbers[EPS] = multiplier, eps
    words[X], words[RESIDUAL], words[WEIGHT], words[TOTAL], words[NORMED] = x, residual, weight, total, normed
    words[NUMBERS], words[NUM_TOKENS], words[SIZE] = address_of(numbers), num_tokens, size
    words[ROUNDS_LAST], words[PIECES] = rounds_last, pieces
    run_job(uint64(pool), uint64(piece), address_of(words), uint64(pieces))
    keep(words)
    keep(numbers)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _piece(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_tokens, size = words[NUM_TOKENS], words[SIZE]
    numbers = array_at(words[NUMBERS], (uint64(2),), np.float32)
    _rms_norm(
        array_at(words[X], (num_tokens, size), stored),
        array_at(words[RESIDUAL], (num_tokens if words[RESIDUAL] else uint64(0), size), stored),
        array_at(words[WEIGHT], (size,), stored),
        array_at(words[TOTAL], (num_tokens, size), stored),
        array_at(words[NORMED], (num_tokens, size), stored),
        numbers[MULTIPLIER],
        numbers[EPS],
        words[ROUNDS_LAST] != 0,
        np.int64(num_tokens * piece // words[PIECES]),
        np.int64(num_tokens * (piece + uint64(1)) // words[PIECES]),
    )


def _bf16_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.uint16)


def _f16_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.int16)


def _fp32_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.float32)


_RMS_NORM = {
    torch.bfloat16: CFunction(_bf16_piece),
    torch.float16: CFunction(_f16_piece),
    torch.float32: CFunction(_fp32_piece),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rms_norm(
    x: Any,
    residual: Any,
    weight: Any,
    total: Any,
    normed: Any,
    multiplier: Any,
    eps: Any,
    rounds_last: bool,
    start: int,
    stop: int,
) -> None:
    """Normalise rows of x, or where there is a residual, rows of total, which is computed first."""
    size = np.int64(x.shape[1])
    whole = size // LANES * LANES
    values, lanes = np.empty(size, np.float32), np.empty(LANES, np.float32)
    for t in range(start, stop):
        row, out = x[t], normed[t]
        if len(residual) > 0:
            before, after = residual[t], total[t]
            for d in range(size):
                rounded = narrow(widen(before[d]) + widen(row[d]) * multiplier, row[d])
                after[d] = rounded
                values[d] = widen(rounded)  # normalise the rounded numbers, which are the next residual
        else:
            for d in range(size):
                values[d] = widen(row[d])
        lanes[:] = float32(0.0)
        for d in range(0, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += values[d + lane] * values[d + lane]
        for d in range(whole, size):
            lanes[d - whole] += values[d] * values[d]
        squares = float32(0.0)
        for lane in range(LANES):
            squares += lanes[lane]
        scale = float32(1.0) / np.sqrt(squares / float32(size) + eps)
        if rounds_last:
            for d in range(size):
                out[d] = narrow(values[d] * scale * widen(weight[d]), row[d])
        else:
            for d in range(size):
                rounded = narrow(values[d] * scale, row[d])
                out[d] = narrow(widen(rounded) * widen(weight[d]), row[d])


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` slowly and obviously, on any device."""
    # A product and a sum: torch.add with alpha fuses them in some elements, depending on their place in the tensor.
    total = (residual.float() + x.float() * multiplier).to(x.dtype)
    return total, rms_norm_ref(total, weight, eps, rounds_last)
