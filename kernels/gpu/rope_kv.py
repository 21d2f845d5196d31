"""Apply rope and write to the KV cache on the GPU, in one pass over the fused qkv rows."""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu.rope import rotate
from moray.kernels.e4m3 import KvScales
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.e4m3 import to_e4m3
from moray.kernels.gpu.sizes import cdiv, next_power_of_2
from moray.kernels.gpu.tuning import Gpu

HEADS = 8  # heads of a token per program
NUM_WARPS = 2


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
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], written in place
    slots:            [num_tokens] int64: block * block_size + position in the block; -1 = write nothing
    kv_scales:        of caches of float8_e4m3fn; None = the caches have the dtype of qkv
    returns:          [num_tokens, num_heads, head_dim], dtype of qkv
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_tokens, width = qkv.shape
    assert width == (num_heads + 2 * num_kv_heads) * head_dim, f"{width} columns of qkv"
    assert all(t.is_contiguous() for t in (qkv, cos, sin, k_cache, v_cache, slots))
    assert (k_cache.dtype == torch.float8_e4m3fn) == (kv_scales is not None), f"a cache of {k_cache.dtype}"
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if kv_scales is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    _rope_kv_kernel[(num_tokens, cdiv(width // head_dim, HEADS))](
        qkv,
        cos,
        sin,
        k_cache,
        v_cache,
        None if kv_scales is None else kv_scales.inverses,
        slots,
        q,
        **_constexprs(num_heads, num_kv_heads, block_size, head_dim, cos.shape[1]),
        num_warps=NUM_WARPS,
    )
    return q


def _constexprs(num_heads: int, num_kv_heads: int, block_size: int, head_dim: int, half: int) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "D": head_dim,
        "HALF": half,
        "HALF_PAD": next_power_of_2(half),
        "REST_PAD": next_power_of_2(head_dim - 2 * half),
        "HEADS": HEADS,
    }


@triton.jit
def _store(
    x,
    dims,
    is_dim,
    q,
    k_cache,
    v_cache,
    kv_inverses,
    token,
    slot,
    heads,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """Store x, [heads, dims], some dims of some heads of qkv: each head to q or to its slot in one of the caches."""
    block, position = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_head = heads - NUM_HEADS
    v_head = k_head - KV_HEADS
    k_row = (block * KV_HEADS + k_head) * BLOCK_SIZE + position
    v_row = (block * KV_HEADS + v_head) * BLOCK_SIZE + position
    is_k = (k_head >= 0) & (v_head < 0)
    q_row = token * NUM_HEADS + heads
    tl.store(q + q_row[:, None] * D + dims, x, mask=(k_head < 0)[:, None] & is_dim)
    if kv_inverses is not None:
        # The scales of k heads are followed by those of v heads, as the heads are.
        inverses = tl.load(kv_inverses + k_head, mask=(k_head >= 0) & (v_head < KV_HEADS), other=0.0)
        x = to_e4m3(x.to(tl.float32) * inverses[:, None])
    tl.store(k_cache + k_row[:, None] * D + dims, x, mask=is_k[:, None] & is_dim)
    tl.store(v_cache + v_row[:, None] * D + dims, x, mask=(v_head >= 0)[:, None] & is_dim)


@triton.jit
def _rope_kv_kernel(
    qkv,
    cos,
    sin,
    k_cache,
    v_cache,
    kv_inverses,
    slots,
    q,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Run program (token, group of HEADS of its q, k and v heads)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token)
    is_head = (heads < tl.where(slot >= 0, NUM_HEADS + 2 * KV_HEADS, NUM_HEADS))[:, None]
    rows = qkv + (token * (NUM_HEADS + 2 * KV_HEADS) + heads)[:, None] * D

    dims = tl.arange(0, HALF_PAD)[None, :]
    is_dim = is_head & (dims < HALF)
    first = tl.load(rows + dims, mask=is_dim, other=0.0)
    second = tl.load(rows + HALF + dims, mask=is_dim, other=0.0)
    c = tl.load(cos + token * HALF + dims, mask=dims < HALF, other=0.0)
    s = tl.load(sin + token * HALF + dims, mask=dims < HALF, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    is_v = (heads >= NUM_HEADS + KV_HEADS)[:, None]
    first = tl.where(is_v, first, (a * c - b * s).to(first.dtype))
    second = tl.where(is_v, second, (b * c + a * s).to(second.dtype))
    to = q, k_cache, v_cache, kv_inverses, token, slot, heads
    _store(first, dims, is_dim, *to, NUM_HEADS, KV_HEADS, BLOCK_SIZE, D)
    _store(second, HALF + dims, is_dim, *to, NUM_HEADS, KV_HEADS, BLOCK_SIZE, D)
    if 2 * HALF < D:
        dims = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        is_dim = is_head & (dims < D)
        rest = tl.load(rows + dims, mask=is_dim, other=0.0)
        _store(rest, dims, is_dim, *to, NUM_HEADS, KV_HEADS, BLOCK_SIZE, D)


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
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if kv_scales is not None:
        k, v = kv_scales.quantize(k, 0), kv_scales.quantize(v, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = v[token]
    return q


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return the shapes of the models."""
    models = (
        ("phi-3.5-moe, mixtral-8x7b", "bf16", 32, 8, 128, 128),
        ("phixtral-4x2_8", "fp16", 32, 32, 80, 32),
        ("phi-tiny-moe", "bf16", 16, 4, 128, 128),
        ("qwen3-30b-a3b", "bf16", 32, 4, 128, 128),
        ("granite-3.1-1b-a400m", "bf16", 16, 8, 64, 64),
        ("gpt-oss-20b", "bf16", 64, 8, 64, 64),
        ("phi-3.5-moe fp32", "fp32", 32, 8, 128, 128),
    )
    return [
        Variant(
            f"rope_kv {name}{' fp8' if is_fp8 else ''}",
            _rope_kv_kernel,
            dict.fromkeys(("qkv", "q"), f"*{dtype}:16")
            | dict.fromkeys(("k_cache", "v_cache"), "*u8:16" if is_fp8 else f"*{dtype}:16")
            | {"cos": "*fp32:16", "sin": "*fp32:16", "kv_inverses": "*fp32:16", "slots": "*i64:16"},
            _constexprs(num_heads, num_kv_heads, 64, head_dim, rotary_dim // 2)
            | ({} if is_fp8 else {"kv_inverses": None}),
            num_warps=NUM_WARPS,
        )
        for (name, dtype, num_heads, num_kv_heads, head_dim, rotary_dim), is_fp8 in product(models, (False, True))
    ]
