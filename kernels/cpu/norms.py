"""LayerNorm and RMSNorm on the CPU, of rows or of their sum with a residual, in one call of compiled code."""

from typing import Any

import numba
import numpy as np
import torch
from numba import float32, uint32, uint64
from torch import Tensor
from torch.nn import functional

from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, as_float, bits_of, inlined, narrow, widen
from moray.kernels.cpu.thread_pool import num_cores

LANES = 16  # partial sums of a row, which are added up at its end
MIN_SHARED_ELEMENTS = 2**15  # fewer numbers take less time than sharing them among cores


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Divide each row by its root mean square in fp32, round to x's dtype, then scale (in that order, as Mixtral does).

    x:            [num_tokens, hidden_size], contiguous
    weight:       [hidden_size]
    rounds_last:  scale in fp32 and then round, as gpt-oss does
    """
    normed = torch.empty_like(x)
    _launch(x, None, weight, None, x, normed, 1.0, eps, rounds_last)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x * multiplier + residual, rounded once, and its rms_norm.

    residual: [num_tokens, hidden_size], contiguous
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, None, total, normed, multiplier, eps, rounds_last)
    return total, normed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each row to mean 0 and variance 1 in fp32, then scale and shift; the result is rounded once.

    x:            [num_tokens, hidden_size], contiguous
    weight, bias: [hidden_size]
    """
    normed = torch.empty_like(x)
    _launch(x, None, weight, bias, x, normed, 1.0, eps, True)
    return normed


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return x * multiplier + residual, rounded once, and its layer_norm.

    residual: [num_tokens, hidden_size], contiguous
    """
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, bias, total, normed, multiplier, eps, True)
    return total, normed


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    total: Tensor,
    normed: Tensor,
    multiplier: float,
    eps: float,
    rounds_last: bool,
) -> None:
    assert x.is_contiguous() and (residual is None or residual.is_contiguous()), "norms read contiguous rows"
    for other in (residual, weight, bias):
        assert other is None or other.dtype == x.dtype, f"rows of {x.dtype} beside {other.dtype}"
    pieces = num_cores() if x.numel() >= MIN_SHARED_ELEMENTS else 1
    arguments = (
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        x.shape[0],
        x.shape[1],
        rounds_last,
        bits_of(multiplier),
        bits_of(eps),
        pieces,
    )
    launch(_NORM[x.dtype], arguments, pieces)


# The arguments of the pieces: addresses, where 0 is for no residual and no bias, then sizes and numbers.
X, RESIDUAL, WEIGHT, BIAS, TOTAL, NORMED, NUM_TOKENS, SIZE, ROUNDS_LAST, MULTIPLIER, EPS, PIECES = range(12)
WORDS = 12


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _piece(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_tokens, size = words[NUM_TOKENS], words[SIZE]
    _norm(
        array_at(words[X], (num_tokens, size), stored),
        array_at(words[RESIDUAL], (num_tokens if words[RESIDUAL] else uint64(0), size), stored),
        array_at(words[WEIGHT], (size,), stored),
        array_at(words[BIAS], (size if words[BIAS] else uint64(0),), stored),
        array_at(words[TOTAL], (num_tokens, size), stored),
        array_at(words[NORMED], (num_tokens, size), stored),
        as_float(uint32(words[MULTIPLIER])),
        as_float(uint32(words[EPS])),
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


_NORM = {
    torch.bfloat16: CFunction(_bf16_piece),
    torch.float16: CFunction(_f16_piece),
    torch.float32: CFunction(_fp32_piece),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _norm(
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
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
        if len(bias) > 0:
            mean = _sum(values, lanes, False) / float32(size)
            for d in range(size):
                values[d] -= mean
        scale = float32(1.0) / np.sqrt(_sum(values, lanes, True) / float32(size) + eps)
        if len(bias) > 0:
            for d in range(size):
                out[d] = narrow(values[d] * scale * widen(weight[d]) + widen(bias[d]), row[d])
        elif rounds_last:
            for d in range(size):
                out[d] = narrow(values[d] * scale * widen(weight[d]), row[d])
        else:
            for d in range(size):
                rounded = narrow(values[d] * scale, row[d])
                out[d] = narrow(widen(rounded) * widen(weight[d]), row[d])


@inlined
def _sum(values: Any, lanes: Any, squared: bool) -> Any:
    """Return the sum of the numbers, or of their squares, in an order that vectors of any width can keep."""
    whole = len(values) // LANES * LANES
    lanes[:] = float32(0.0)
    for d in range(0, whole, LANES):
        for lane in range(LANES):
            value = values[d + lane]
            lanes[lane] += value * value if squared else value
    for d in range(whole, len(values)):
        value = values[d]
        lanes[d - whole] += value * value if squared else value
    total = float32(0.0)
    for lane in range(LANES):
        total += lanes[lane]
    return total


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Compute `rms_norm` slowly and obviously, on any device and for any number of dimensions."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed).to(x.dtype) if rounds_last else weight * normed.to(x.dtype)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, rounds_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` slowly and obviously, on any device."""
    total = add_ref(x, residual, multiplier)
    return total, rms_norm_ref(total, weight, eps, rounds_last)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute `layer_norm` by torch, on any device."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute `add_layer_norm` by torch, on any device."""
    total = add_ref(x, residual, multiplier)
    return total, layer_norm_ref(total, weight, bias, eps)


def add_ref(x: Tensor, residual: Tensor, multiplier: float) -> Tensor:
    """Return x * multiplier + residual, rounded once."""
    # A product and a sum: torch.add with alpha fuses them in some elements, depending on their place in the tensor.
    return (residual.float() + x.float() * multiplier).to(x.dtype)
