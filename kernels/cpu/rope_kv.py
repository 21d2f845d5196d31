"""Apply rope and write to the KV cache on the CPU, in one pass over the fused qkv rows."""

from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor

from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, inlined, narrow, narrow_to_e4m3, widen
from moray.kernels.cpu.rope import rotate
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.e4m3 import KvScales

MIN_SHARED_ELEMENTS = 2**16  # fewer numbers take less time than sharing them among cores


def rope_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Rotate q and k in the half layout, write k and v to their slots, return q. (RoFormer, arXiv 2104.09864)

    The leading rotary_dim dims of a head are rotated in fp32 and rounded once; the other dims are copied.

    qkv:              [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v, each head by head
    cos, sin:         [num_tokens, rotary_dim / 2] fp32, already multiplied by any mscale
    k_cache, v_cache: see paged_attention; written in place
    slots:            [num_tokens] int64: block * block_size + position in the block
    kv_scales:        of caches of float8_e4m3fn; None = the caches have the dtype of qkv
    returns:          [num_tokens, num_heads, head_dim], dtype of qkv
    """
    num_tokens, num_blocks = len(qkv), len(k_cache)
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert k_cache.stride(3) == block_size and v_cache.is_contiguous()
    assert (k_cache.dtype == torch.float8_e4m3fn) == (kv_scales is not None), f"a cache of {k_cache.dtype}"
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    pieces = num_cores() if qkv.numel() >= MIN_SHARED_ELEMENTS else 1
    arguments = (
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        0 if kv_scales is None else kv_scales.inverses.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        cos.shape[1],
        num_blocks,
        block_size,
        pieces,
    )
    launch(_ROPE_KV[qkv.dtype, kv_scales is not None], arguments, pieces)
    return q


# The arguments of the pieces: addresses, then sizes; see rope_kv.
QKV, COS, SIN, K, V, KV_INVERSES, SLOTS, Q = range(8)
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, NUM_BLOCKS, BLOCK_SIZE, PIECES = range(8, 16)
WORDS = 16


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rope_kv_piece(arguments: Any, piece: Any, stored: Any, cached: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_tokens, num_heads, num_kv_heads = words[NUM_TOKENS], words[NUM_HEADS], words[NUM_KV_HEADS]
    head_dim, half, num_blocks, block_size = words[HEAD_DIM], words[HALF], words[NUM_BLOCKS], words[BLOCK_SIZE]
    _rope_kv(
        array_at(words[QKV], (num_tokens, num_heads + num_kv_heads + num_kv_heads, head_dim), stored),
        array_at(words[COS], (num_tokens, half), np.float32),
        array_at(words[SIN], (num_tokens, half), np.float32),
        array_at(words[K], (num_blocks, num_kv_heads, head_dim, block_size), cached),
        array_at(words[V], (num_blocks, num_kv_heads, block_size, head_dim), cached),
        array_at(words[KV_INVERSES], (uint64(2), num_kv_heads if words[KV_INVERSES] else uint64(0)), np.float32),
        array_at(words[SLOTS], (num_tokens,), np.int64),
        array_at(words[Q], (num_tokens, num_heads, head_dim), stored),
        np.int64(num_tokens * piece // words[PIECES]),
        np.int64(num_tokens * (piece + uint64(1)) // words[PIECES]),
    )


def _rope_kv_bf16(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.uint16, np.uint16)


def _rope_kv_f16(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.int16, np.int16)


def _rope_kv_fp32(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.float32, np.float32)


def _rope_kv_bf16_e4m3(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.uint16, np.uint8)


def _rope_kv_f16_e4m3(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.int16, np.uint8)


def _rope_kv_fp32_e4m3(arguments: Any, piece: Any) -> None:
    _rope_kv_piece(arguments, piece, np.float32, np.uint8)


_ROPE_KV = {  # by the dtype of qkv, and whether the caches are of e4m3
    (torch.bfloat16, False): CFunction(_rope_kv_bf16),
    (torch.float16, False): CFunction(_rope_kv_f16),
    (torch.float32, False): CFunction(_rope_kv_fp32),
    (torch.bfloat16, True): CFunction(_rope_kv_bf16_e4m3),
    (torch.float16, True): CFunction(_rope_kv_f16_e4m3),
    (torch.float32, True): CFunction(_rope_kv_fp32_e4m3),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rope_kv(
    heads: Any,
    cos: Any,
    sin: Any,
    k_cache: Any,
    v_cache: Any,
    kv_inverses: Any,
    slots: Any,
    q: Any,
    start: int,
    stop: int,
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[3]
    key = np.empty_like(q[0, 0])
    for t in range(start, stop):
        block, at = slots[t] // block_size, slots[t] % block_size
        for h in range(num_heads):
            _rotate(heads[t, h], cos[t], sin[t], q[t, h])
        for h in range(num_kv_heads):
            _rotate(heads[t, num_heads + h], cos[t], sin[t], key)
            value = heads[t, num_heads + num_kv_heads + h]
            if len(kv_inverses[0]) > 0:
                for d in range(head_dim):
                    k_cache[block, h, d, at] = narrow_to_e4m3(widen(key[d]) * kv_inverses[0, h])
                    v_cache[block, h, at, d] = narrow_to_e4m3(widen(value[d]) * kv_inverses[1, h])
            else:
                for d in range(head_dim):
                    k_cache[block, h, d, at] = key[d]
                    v_cache[block, h, at, d] = value[d]


@inlined
def _rotate(x: Any, cos: Any, sin: Any, out: Any) -> None:
    half = len(cos)
    for d in range(half):
        a, b = widen(x[d]), widen(x[half + d])
        out[d] = narrow(a * cos[d] - b * sin[d], x[d])
        out[half + d] = narrow(b * cos[d] + a * sin[d], x[d])
    for d in range(2 * half, len(x)):
        out[d] = x[d]


def rope_kv_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Compute `rope_kv` slowly and obviously."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    k = rotate(k, cos, sin)
    if kv_scales is not None:
        k, v = kv_scales.quantize(k, 0), kv_scales.quantize(v, 1)
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v
    return rotate(q, cos, sin)
