"""Attention over a paged KV cache on the GPU: decode steps, prefill chunks and mixes of both, one kernel.

A program attends from a tile of queries, the heads that share a KV head side by side in its rows, to splits of 256 keys
at fixed positions. Each split starts a softmax of its own; the splits are then folded in order. Either a program folds
its splits as it goes, or several programs share them, leave each split's result in memory and a second kernel folds:
the same operations on the same numbers. So a query's result is bitwise the same whatever chunk it comes in, whatever
stands beside it and however wide the block table is:

- Tiles have one size for decode and prefill, hence one MMA instruction and one order of sums.
- Keys that a query may not see weigh exactly 0: a tile or split of nothing else leaves its result as it is.
- Additions to products are written as fma: left to the compiler, they might be fused here and not there.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.aot import Variant
from kernels.gpu.attention_splits import LOWEST, find_tile, fold, fold_kernel

SPLIT_KEYS = 256
TILE_ROWS = 64  # the least that warp-group MMA takes; decode leaves most empty, but it waits for memory anyway
TILE_KEYS = 32  # with 64, a split's sums and those of all splits do not fit the registers together
NUM_STAGES = 5  # two tiles of keys are on their way: block numbers, which say where they lie, take stages of their own
PROGRAMS = 2048  # splits are shared among programs while there are fewer than this: 8 times what an H200 runs at once
SHARED_BYTES = 2**28  # the most memory that shared splits may take


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, causal, scores and sums in fp32.

    A step's tokens stand one sequence after the other. Sequence i has those from query_starts[i] to query_starts[i + 1]
    (none, if it is padding), the last of its context_lens[i] keys, which the cache already holds. Slots past them are
    never read. Launched alike for all contents of equal shapes, without a look at them.

    q:                [num_tokens, num_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables:     [num_seqs, max_blocks] int32; entries past the context are never read
    query_starts:     [num_seqs + 1] int32, ascending from 0
    context_lens:     [num_seqs] int32, up to max_blocks * block_size
    sliding_window:   keys a query sees, itself included; None = all
    returns:          like q; tokens from query_starts[num_seqs] on are left undefined
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_seqs, max_blocks = block_tables.shape
    group = num_heads // num_kv_heads
    tile_tokens = TILE_ROWS // triton.next_power_of_2(group)
    assert q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.is_contiguous()
    assert group * num_kv_heads == num_heads and tile_tokens, f"{num_heads} heads on {num_kv_heads} KV heads"
    assert block_size >= 16 and block_size & block_size - 1 == 0, f"blocks of {block_size} tokens"
    if sliding_window is not None and sliding_window >= max_blocks * block_size:
        sliding_window = None

    out = torch.empty_like(q)
    # Sequence i's tiles are numbered from query_starts[i] // tile_tokens + i: room for all, whatever the lengths.
    num_tiles = num_tokens // tile_tokens + num_seqs
    max_splits = triton.cdiv(max_blocks * block_size, SPLIT_KEYS)
    num_shares = min(max_splits, PROGRAMS // (num_tiles * num_kv_heads))
    shared = num_shares > 1 and num_tokens * num_heads * max_splits * (head_dim + 2) * 4 <= SHARED_BYTES
    sums, tops = q, q
    if shared:
        sums = q.new_empty(num_tokens, num_heads, max_splits, head_dim, dtype=torch.float32)
        tops = q.new_empty(num_tokens, num_heads, max_splits, 2, dtype=torch.float32)
    heads = _head_constexprs(num_kv_heads, group, head_dim, sliding_window)
    _attention_kernel[(num_tiles, num_kv_heads, num_shares if shared else 1)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        out,
        sums,
        tops,
        scale * 1.4426950408889634,  # of 2, not of e
        num_seqs,
        max_blocks,
        max_splits,
        **heads,
        BLOCK_SIZE=block_size,
        TILE_ROWS=TILE_ROWS,
        TILE_KEYS=TILE_KEYS,
        SHARED=shared,
        num_warps=_num_warps(torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9),
        num_stages=NUM_STAGES,
    )
    if shared:
        fold_kernel[(num_tokens + num_seqs, num_kv_heads)](
            sums, tops, query_starts, context_lens, out, num_seqs, max_splits, **heads, num_warps=1
        )
    return out


def _num_warps(major: int) -> int:
    """Compute capability 8.x keeps queries, too, in registers: twice as many warps have room for them."""
    return 4 if major >= 9 else 8


def _head_constexprs(num_kv_heads: int, group: int, head_dim: int, sliding_window: int | None) -> dict[str, Any]:
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PAD": triton.next_power_of_2(group),
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "SPLIT_KEYS": SPLIT_KEYS,
        "WINDOW": sliding_window,
    }


@triton.jit
def _load(places, dims, D: tl.constexpr, D_PAD: tl.constexpr):
    if D == D_PAD:
        return tl.load(places)
    else:
        return tl.load(places, mask=(dims < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_seqs", "max_blocks", "max_splits"])
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_starts,
    context_lens,
    out,
    shared_sums,
    shared_tops,
    scale,
    num_seqs,
    max_blocks,
    max_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Program (tile, KV head, share); shares take turns at the splits, which they store if SHARED."""
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP_PAD
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles of a prompt see most keys: they start first
    kv_head = tl.program_id(1)
    seq, token, position, left = find_tile(query_starts, context_lens, num_seqs, tile, TILE_TOKENS)
    if left <= 0:
        return

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, D_PAD)
    in_row = rows // GROUP_PAD
    is_row = (in_row < left) & (rows % GROUP_PAD < GROUP)
    positions = position + in_row
    out_rows = (token + in_row).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP_PAD
    is_value = is_row[:, None] & (dims < D)[None, :]
    queries = tl.load(q + out_rows[:, None] * D + dims[None, :], mask=is_value, other=0.0)

    table = block_tables + seq.to(tl.int64) * max_blocks
    end = position + tl.minimum(left, TILE_TOKENS)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS

    top = tl.full([TILE_ROWS], LOWEST, tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    sums = tl.zeros([TILE_ROWS, D_PAD], tl.float32)
    for split in range(begin // SPLIT_KEYS + tl.program_id(2), tl.cdiv(end, SPLIT_KEYS), tl.num_programs(2)):
        new_top = tl.full([TILE_ROWS], LOWEST, tl.float32)
        new_total = tl.zeros([TILE_ROWS], tl.float32)
        new_sums = tl.zeros([TILE_ROWS, D_PAD], tl.float32)
        stop = tl.minimum(split * SPLIT_KEYS + SPLIT_KEYS, end)
        for start in range(tl.maximum(split * SPLIT_KEYS, begin), stop, TILE_KEYS):
            keys = start + tl.arange(0, TILE_KEYS)
            # Past the last key it is read again: what a slot not yet written holds would spoil sums, even if weighed 0.
            held = tl.minimum(keys, end - 1)
            if BLOCK_SIZE >= TILE_KEYS:
                block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            else:
                block = tl.load(table + held // BLOCK_SIZE).to(tl.int64)
            slots = (block * KV_HEADS + kv_head) * BLOCK_SIZE + held % BLOCK_SIZE
            places = slots[:, None] * D + dims[None, :]

            k = _load(k_cache + places, dims, D, D_PAD)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            is_seen = keys[None, :] <= positions[:, None]
            if WINDOW is not None:
                is_seen = is_seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))

            v = _load(v_cache + places, dims, D, D_PAD)
            larger = tl.maximum(new_top, tl.max(scores, axis=1))
            shrink = tl.exp2(new_top - larger)
            weights = tl.exp2(scores - larger[:, None])
            new_total = tl.fma(new_total, shrink, tl.sum(weights, axis=1))
            new_sums = tl.dot(weights.to(v.dtype), v, new_sums * shrink[:, None], input_precision="ieee")
            new_top = larger
        if SHARED:
            places = out_rows * max_splits + split
            tl.store(shared_tops + places * 2, new_top, mask=is_row)
            tl.store(shared_tops + places * 2 + 1, new_total, mask=is_row)
            tl.store(shared_sums + places[:, None] * D + dims[None, :], new_sums, mask=is_value)
        else:
            top, total, sums = fold(top, total, sums, new_top, new_total, new_sums)
    if not SHARED:
        result = sums * (1.0 / tl.where(is_row, total, 1.0))[:, None]
        tl.store(out + out_rows[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=is_value)


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Slow and obvious `paged_attention`: one sequence at a time; zeros where it leaves its result undefined."""
    out = torch.zeros_like(q)
    block_size = k_cache.shape[2]
    heads_per_kv = q.shape[1] // k_cache.shape[1]
    starts = query_starts.tolist()
    for start, stop, end, table in zip(starts, starts[1:], context_lens.tolist(), block_tables, strict=False):
        if start == stop:
            continue
        blocks = table[: triton.cdiv(end, block_size)].long()
        k, v = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:end].float().repeat_interleave(heads_per_kv, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), k) * scale
        keys = torch.arange(end, device=q.device)
        distance = keys[end - (stop - start) :, None] - keys
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def aot_variants() -> list[Variant]:
    """Both kinds of launch for the three models, at the block sizes in use."""
    variants = []
    for name, dtype, heads, kv_heads, head_dim, window in (
        ("phi-3.5-moe", "bf16", 32, 8, 128, None),
        ("phixtral-4x2_8", "fp16", 32, 32, 80, None),
        ("mixtral-8x7b", "bf16", 32, 8, 128, 4096),
    ):
        constexprs = _head_constexprs(kv_heads, heads // kv_heads, head_dim, window)
        tables = {"query_starts": "*i32:16", "context_lens": "*i32:16", "num_seqs": "i32", "max_splits": "i32"}
        for block_size, shared, major in product((16, 64), (False, True), (8, 9)):
            kind = "*fp32:16" if shared else f"*{dtype}:16"
            variants.append(
                Variant(
                    f"paged_attention {name} block {block_size}{' shared' if shared else ''}",
                    _attention_kernel,
                    dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{dtype}:16")
                    | tables
                    | {"block_tables": "*i32:16", "max_blocks": "i32", "scale": "fp32"}
                    | {"shared_sums": kind, "shared_tops": kind},
                    constexprs
                    | {"BLOCK_SIZE": block_size, "TILE_ROWS": TILE_ROWS, "TILE_KEYS": TILE_KEYS, "SHARED": shared},
                    num_warps=_num_warps(major),
                    num_stages=NUM_STAGES,
                    wants_wgmma=True,
                    targets=(10 * major,),
                )
            )
        variants.append(
            Variant(
                f"paged_attention fold {name}",
                fold_kernel,
                tables | {"shared_sums": "*fp32:16", "shared_tops": "*fp32:16", "out": f"*{dtype}:16"},
                constexprs,
                num_warps=1,
            )
        )
    return variants
