"""Apply rope and write to the KV cache on the CPU, in one pass over the fused qkv rows."""

from typing import Any

import torch
from torch import Tensor

from moray.kernels.cpu.numba_intrinsics import array, compiled, narrow, widen
from moray.kernels.cpu.rope import rotate
from moray.kernels.cpu.thread_pool import parallel_rows


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
    num_tokens, head_dim = len(qkv), k_cache.shape[3]
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    heads = qkv.view(num_tokens, -1, head_dim)
    arrays = [array(t) for t in (heads, cos, sin, k_cache.transpose(2, 3), v_cache, slots, q)]
    parallel_rows(lambda start, stop: _rope_kv(*arrays, start, stop), *qkv.shape)
    return q


@compiled
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
