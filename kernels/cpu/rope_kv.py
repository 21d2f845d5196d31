"""Apply rope and write to the KV cache on the CPU, in one pass over the fused qkv rows."""

from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, compiled, keep, narrow, widen
from moray.kernels.cpu.rope import rotate
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of

MIN_SHARED_ELEMENTS = 2**16  # fewer numbers take less time than sharing them among cores


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
) -> Tensor:
    """Rotate q and k in the half layout, write k and v to their slots, return q. (RoFormer, arXiv 2104.09864)

    The leading rotary_dim dims of a head are rotated in fp32 and rounded once; the other dims are copied.

    qkv:              [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v, each head by head
    cos, sin:         [num_tokens, rotary_dim / 2] fp32, already multiplied by any mscale
    k_cache, v_cache: see paged_attention; written in place
    slots:            [num_tokens] int64: block * block_size + position in the block
    returns:          [num_tokens, num_heads, head_dim], dtype of qkv
    """
    num_tokens, num_blocks = len(qkv), len(k_cache)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert k_cache.stride(3) == block_size and v_cache.is_contiguous()
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    cores = num_cores()
    _run(
        pool_of(cores),
        cores if qkv.numel() >= MIN_SHARED_ELEMENTS else 1,
        _ROPE_KV[qkv.dtype].address,
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        cos.shape[1],
        num_blocks,
        block_size,
    )
    return q


# The arguments of the pieces: addresses, then sizes; see rope_kv.
QKV, COS, SIN, K, V, SLOTS, Q = range(7)
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, NUM_BLOCKS, BLOCK_SIZE, PIECES = range(7, 15)
WORDS = 15


@compiled
def _run(
    pool: int,
    pieces: int,
    rope_piece: int,
    qkv: int,
    cos: int,
    sin: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    q: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    half: int,
    num_blocks: int,
    block_size: int,
) -> None:
    words = np.empty(WORDS, np.uint64)
    words[QKV], words[COS], words[SIN], words[K], words[V], words[SLOTS] = qkv, cos, sin, k_cache, v_cache, slots
    words[Q], words[NUM_TOKENS], words[NUM_HEADS], words[NUM_KV_HEADS] = q, num_tokens, num_heads, num_kv_heads
    words[HEAD_DIM], words[HALF], words[NUM_BLOCKS], words[BLOCK_SIZE] = head_dim, half, num_blocks, block_size
    words[PIECES] = pieces
    run_job(uint64(pool), uint64(rope_piece), address_of(words), uint64(pieces))
    keep(words)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rope_kv_piece(arguments: Any, piece: Any, stored: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_tokens, num_heads, num_kv_heads = words[NUM_TOKENS], words[NUM_HEADS], words[NUM_KV_HEADS]
    head_dim, half, num_blocks, block_size = words[HEAD_DIM], words[HALF], words[NUM_BLOCKS], words[BLOCK_SIZE]
    _rope_kv(
        array_at(words[QKV], (num_tokens, num_heads + num_kv_heads + num_kv_heads, head_dim), stored),
        array_at(words[COS], (num_tokens, half), np.float32),
        array_at(words[SIN], (num_tokens, half), np.float32),
        array_at(words[K], (num_blocks, num_kv_heads, head_dim, block_size), stored),
        array_at(words[V], (num_blocks, num_kv_heads, block_size, head_dim), stored),
        array_at(words[SLOTS], (num_tokens,), np.int64),
        array_at(words[Q], (num_tokens, num_heads, head_dim), stored),
        np.int64(num_tokens * piece // words[PIECES]),
        np.int64(num_tokens * (piece + uint64(1)) // words[PIECES]),
    )


def _rope_kv_bf16(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.uint16)


def _rope_kv_f16(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.int16)


def _rope_kv_fp32(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.float32)


_ROPE_KV = {
    torch.bfloat16: CFunction(_rope_kv_bf16),
    torch.float16: CFunction(_rope_kv_f16),
    torch.float32: CFunction(_rope_kv_fp32),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rope_kv(
    heads: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, slots: Any, q: Any, start: int, stop: int
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[3]
    half = cos.shape[1]
    for t in range(start, stop):
        block, at = slots[t] // block_size, slots[t] % block_size
        for h in range(num_heads + num_kv_heads):
            rotated = q[t, h] if h < num_heads else k_cache[block, h - num_heads, :, at]
            x = heads[t, h]
            for d in range(half):
                a, b = widen(x[d]), widen(x[half + d])
                rotated[d] = narrow(a * cos[t, d] - b * sin[t, d], x[d])
                rotated[half + d] = narrow(b * cos[t, d] + a * sin[t, d], x[d])
            for d in range(2 * half, head_dim):
                rotated[d] = x[d]
        for h in range(num_kv_heads):
            v_cache[block, h, at] = heads[t, num_heads + num_kv_heads + h]


def rope_kv_ref(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int
) -> Tensor:
    """Compute `rope_kv` slowly and obviously."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = rotate(k, cos, sin)
    v_cache[blocks, :, offsets] = v
    return rotate(q, cos, sin)
