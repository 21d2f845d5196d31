"""Normalise the queries and keys of fused qkv rows on the CPU, in place."""

from typing import Any

import numba
import numpy as np
import torch
from numba import float32, uint32, uint64
from torch import Tensor

from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.norms import rms_norm_ref
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, as_float, bits_of, narrow, widen
from moray.kernels.cpu.thread_pool import num_cores

LANES = 8  # partial sums of a row's squares, which are added up at its end
MIN_SHARED_ELEMENTS = 2**15  # fewer numbers take less time than sharing them among cores


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float) -> None:
    """Apply an RMSNorm to each of the leading segments of every row: num_q of queries, then num_k of keys.

    A segment is a head, or all heads together. It is divided by its root mean square in fp32, rounded, and then scaled.
    The columns after the segments stay as they are.

    qkv:       [num_tokens, width], contiguous, changed in place
    q_weight:  [columns of a segment of queries]
    k_weight:  [columns of a segment of keys]
    """
    assert qkv.is_contiguous(), f"strides {qkv.stride()}"
    assert q_weight.dtype == k_weight.dtype == qkv.dtype, f"rows of {qkv.dtype} beside {q_weight.dtype}"
    pieces = num_cores() if qkv.numel() >= MIN_SHARED_ELEMENTS else 1
    arguments = (
        qkv.data_ptr(),
        q_weight.data_ptr(),
        k_weight.data_ptr(),
        qkv.shape[0],
        qkv.shape[1],
        len(q_weight),
        len(k_weight),
        num_q,
        num_k,
        bits_of(eps),
        pieces,
    )
    launch(_QK_NORM[qkv.dtype], arguments, pieces)


# The arguments of the pieces: addresses, then sizes and the bits of eps.
QKV, Q_WEIGHT, K_WEIGHT, NUM_TOKENS, WIDTH, Q_SIZE, K_SIZE, NUM_Q, NUM_K, EPS, PIECES = range(11)
WORDS = 11


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _piece(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_tokens = words[NUM_TOKENS]
    _qk_norm(
        array_at(words[QKV], (num_tokens, words[WIDTH]), stored),
        array_at(words[Q_WEIGHT], (words[Q_SIZE],), stored),
        array_at(words[K_WEIGHT], (words[K_SIZE],), stored),
        np.int64(words[NUM_Q]),
        np.int64(words[NUM_K]),
        as_float(uint32(words[EPS])),
        np.int64(num_tokens * piece // words[PIECES]),
        np.int64(num_tokens * (piece + uint64(1)) // words[PIECES]),
    )


def _bf16_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.uint16)


def _f16_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.int16)


def _fp32_piece(arguments: Any, piece: Any) -> None:
    _piece(arguments, piece, np.float32)


_QK_NORM = {
    torch.bfloat16: CFunction(_bf16_piece),
    torch.float16: CFunction(_f16_piece),
    torch.float32: CFunction(_fp32_piece),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _qk_norm(qkv: Any, q_weight: Any, k_weight: Any, num_q: int, num_k: int, eps: Any, start: int, stop: int) -> None:
    lanes = np.empty(LANES, np.float32)
    for t in range(start, stop):
        first = 0
        for segment in range(num_q + num_k):
            weight = q_weight if segment < num_q else k_weight
            x = qkv[t, first : first + len(weight)]
            first += len(weight)
            whole = len(x) // LANES * LANES
            lanes[:] = float32(0.0)
            for d in range(0, whole, LANES):
                for lane in range(LANES):
                    value = widen(x[d + lane])
                    lanes[lane] += value * value
            for d in range(whole, len(x)):
                value = widen(x[d])
                lanes[d - whole] += value * value
            total = float32(0.0)
            for lane in range(LANES):
                total += lanes[lane]
            scale = float32(1.0) / np.sqrt(total / float32(len(x)) + eps)
            for d in range(len(x)):
                rounded = narrow(widen(x[d]) * scale, x[d])
                x[d] = narrow(widen(rounded) * widen(weight[d]), x[d])


def qk_norm_ref(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float) -> None:
    """Compute `qk_norm` slowly and obviously, on any device."""
    q, k = num_q * len(q_weight), num_k * len(k_weight)
    for part, weight in ((qkv[:, :q], q_weight), (qkv[:, q : q + k], k_weight)):
        part.copy_(rms_norm_ref(part.reshape(len(part), -1, len(weight)), weight, eps).flatten(1))
