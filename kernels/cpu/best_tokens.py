"""Find the largest logit of each row, as greedy sampling does."""

from typing import Any

import numba
import numpy as np
import torch
from numba import int32, uint32, uint64
from torch import Tensor

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, as_bits, compiled, keep, widen
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

MIN_SHARED_ELEMENTS = 2**16  # fewer numbers take less time than sharing them among cores
NO_TOKEN = -1  # of a row whose largest logit is not a finite number
INFINITY_BITS = 0x7F800000


def best_tokens(logits: Tensor) -> Tensor:
    """Return the token of each row's largest logit, the lowest id among equals; NO_TOKEN if it is not finite.

    A row with a NaN has no largest logit.

    logits:  [num_rows, vocab_size] fp32, fp16 or bf16
    returns: [num_rows] int64
    """
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64)
    cores = num_cores()
    pieces = num_rows if logits.numel() >= MIN_SHARED_ELEMENTS else 1
    function = _FIND[logits.dtype].address
    _run(pool_of(cores), pieces, function, logits.data_ptr(), out.data_ptr(), num_rows, vocab_size)
    return out


WORDS = 5


@compiled
def _run(pool: int, pieces: int, function: int, logits: int, out: int, num_rows: int, vocab_size: int) -> None:
    words = np.empty(WORDS, np.uint64)
    words[0], words[1], words[2], words[3], words[4] = logits, out, num_rows, vocab_size, pieces
    run_job(uint64(pool), uint64(function), address_of(words), uint64(pieces))
    keep(words)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _find(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_rows, width, pieces = words[2], words[3], words[4]
    out = array_at(words[1], (num_rows,), np.int64)
    logits = array_at(words[0], (num_rows, width), stored)
    for row in range(num_rows * piece // pieces, num_rows * (piece + uint64(1)) // pieces):
        # Maxima of whole numbers are vectorized, those of floats are not: -0 and 0 are equal, and NaN is not itself.
        largest, has_nan = int32(-(2**31)), uint32(0)
        for i in range(width):
            bits = int32(as_bits(widen(logits[row, i])))
            has_nan |= uint32((bits & int32(0x7FFFFFFF)) > int32(INFINITY_BITS))
            ordered = bits ^ ((bits >> int32(31)) & int32(0x7FFFFFFF))
            largest = ordered if ordered > largest else largest
        bits = largest ^ ((largest >> int32(31)) & int32(0x7FFFFFFF))
        out[row] = NO_TOKEN
        if has_nan == uint32(0) and (bits & int32(0x7FFFFFFF)) != int32(INFINITY_BITS):
            for i in range(width):
                found = int32(as_bits(widen(logits[row, i])))
                if found == bits or ((found | bits) & int32(0x7FFFFFFF)) == int32(0):
                    out[row] = np.int64(i)
                    break


def _find_bf16(arguments: Any, piece: Any) -> None:
    _find(arguments, piece, np.uint16)


def _find_f16(arguments: Any, piece: Any) -> None:
    _find(arguments, piece, np.int16)


def _find_fp32(arguments: Any, piece: Any) -> None:
    _find(arguments, piece, np.float32)


_FIND = {
    torch.bfloat16: CFunction(_find_bf16),
    torch.float16: CFunction(_find_f16),
    torch.float32: CFunction(_find_fp32),
}


def best_tokens_ref(logits: Tensor) -> Tensor:
    """Compute `best_tokens` in torch."""
    best = logits.float().max(1)
    return torch.where(best.values.isfinite(), best.indices, NO_TOKEN)
