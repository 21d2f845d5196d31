"""Attention over a paged KV cache on the GPU: one kernel for decode steps, prefill chunks and mixes of both.

A program attends from a tile of queries, whose rows hold the heads that share a KV head, to splits of 256 keys at fixed
positions. Each split starts a new softmax, and the results of the splits are merged in order. Either a program merges
its splits as it computes them, or several programs share the splits of a tile and store the result of each split, and a
second kernel merges them: the same operations on the same numbers. So a query's result is bitwise the same whatever its
chunk, the other queries of the step and the width of the block table:

- Tiles have one size for decode and prefill, hence one MMA instruction and one order of sums.
- Masked keys have a weight of exactly 0: a tile or split of masked keys alone does not change the result.
- Additions to products are written as fma, because the compiler might fuse them in one place and not in another.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.e4m3 import KvScales
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.e4m3 import from_e4m3
from moray.kernels.gpu.sizes import cdiv, next_power_of_2
from moray.kernels.gpu.split_kv import (
    LOG2_E,
    LOWEST,
    MANY_SPLITS,
    find_tile,
    first_state,
    merge_options,
    merge_splits_kernel,
    merge_states,
)
from moray.kernels.gpu.tuning import Gpu, device
from moray.kernels.workspace import ATTENTION_BYTES

SPLIT_KEYS = 256  # keys in a split
TILE_ROWS = 64  # the minimum of warp-group MMA; decode leaves most rows empty, but it waits for memory anyway
TILE_KEYS = 32  # with 64, the sums of one split and of all splits do not fit in the registers together
NUM_STAGES = 5  # keeps two tiles of keys in flight: loading block numbers, which give their addresses, takes stages too
# Several programs share the splits of a tile up to this many programs in all: 8 times what an H200 runs at once.
MAX_PROGRAMS = 2048


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, with causal masking; scores and sums are in fp32.

    The tokens of a step are ordered sequence by sequence. Sequence i has the tokens from query_starts[i] to
    query_starts[i + 1] - 1 (none if it is padding), which are the last of its context_lens[i] keys; the cache holds
    those already. Slots after them are never read. The launch depends on the shapes alone, not on the contents of
    tensors.

    q:                [num_tokens, num_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables:     [num_seqs, max_blocks] int32; entries after the context are never read
    query_starts:     [num_seqs + 1] int32, ascending from 0
    context_lens:     [num_seqs] int32, up to max_blocks * block_size
    sliding_window:   number of keys that a query attends to, its own included; None = all
    sinks:            [num_heads] fp32, a score of each head that has a weight in the softmax and no value; it is not
                      scaled. None = there are none
    kv_scales:        of caches of float8_e4m3fn; None = the caches have the dtype of q
    returns:          shape and dtype of q; tokens from query_starts[num_seqs] on are undefined
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_seqs, max_blocks = block_tables.shape
    group = num_heads // num_kv_heads
    tile_tokens = TILE_ROWS // next_power_of_2(group)
    assert q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.is_contiguous()
    assert group * num_kv_heads == num_heads and tile_tokens, f"{num_heads} heads on {num_kv_heads} KV heads"
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (num_heads,) and sinks.is_contiguous())
    assert block_size >= 16 and block_size & block_size - 1 == 0, f"blocks of {block_size} tokens"
    assert (k_cache.dtype == torch.float8_e4m3fn) == (kv_scales is not None), f"a cache of {k_cache.dtype}"
    if kv_scales is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if sliding_window is not None and sliding_window >= max_blocks * block_size:
        sliding_window = None

    out = torch.empty_like(q)
    # Sequence i's tiles are numbered from query_starts[i] // tile_tokens + i, which leaves room for any lengths.
    num_tiles = num_tokens // tile_tokens + num_seqs
    max_splits = cdiv(max_blocks * block_size, SPLIT_KEYS)
    programs_per_tile = min(max_splits, MAX_PROGRAMS // (num_tiles * num_kv_heads))
    is_split = programs_per_tile > 1 and num_tokens * num_heads * max_splits * (head_dim + 2) * 4 <= ATTENTION_BYTES
    sums, stats = q, q
    if is_split:
        sums = q.new_empty(num_tokens, num_heads, max_splits, head_dim, dtype=torch.float32)
        stats = q.new_empty(num_tokens, num_heads, max_splits, 2, dtype=torch.float32)
    heads = _head_constexprs(num_kv_heads, group, head_dim, sliding_window)
    _attention_kernel[(num_tiles, num_kv_heads, programs_per_tile if is_split else 1)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        sinks,
        None if kv_scales is None else kv_scales.scales,
        out,
        sums,
        stats,
        scale * LOG2_E.value,
        num_seqs,
        max_blocks,
        max_splits,
        **heads,
        BLOCK_SIZE=block_size,
        TILE_ROWS=TILE_ROWS,
        TILE_KEYS=TILE_KEYS,
        IS_SPLIT=is_split,
        num_warps=_num_warps(device(), q.element_size()),
        num_stages=_num_stages(q.element_size()),
    )
    if is_split:
        merge_splits_kernel[(num_tokens + num_seqs, num_kv_heads)](
            sums,
            stats,
            query_starts,
            context_lens,
            sinks,
            out,
            num_seqs,
            max_splits,
            **heads,
            **merge_options(group, head_dim, max_splits),
        )
    return out


def _num_warps(gpu: Gpu, itemsize: int) -> int:
    """Return the number of warps. Hopper multiplies 16-bit numbers from shared memory and needs 4.

    Other GPUs, and fp32, keep queries in registers too, which spill with as many rows per thread; 8 warps have enough
    registers for them.
    """
    return 4 if gpu.capability[0] == 9 and itemsize == 2 else 8


def _num_stages(itemsize: int) -> int:
    """Return the number of stages: fewer for fp32, whose keys take 107 KB with all stages, more than small GPUs have.

    The addresses of more stages also take registers.
    """
    return NUM_STAGES if itemsize == 2 else NUM_STAGES - 2


def _head_constexprs(num_kv_heads: int, group: int, head_dim: int, sliding_window: int | None) -> dict[str, Any]:
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PAD": next_power_of_2(group),
        "D": head_dim,
        "D_PAD": next_power_of_2(head_dim),
        "SPLIT_KEYS": SPLIT_KEYS,
        "WINDOW": sliding_window,
    }


@triton.jit
def _load(pointers, is_loaded, DTYPE: tl.constexpr, IS_VALUE: tl.constexpr):
    """Load keys or values as numbers of DTYPE; what is stored of an e4m3 cache is bytes.

    A token whose hidden states are NaN has values of NaN, which reach all tokens after it: only those are looked for.
    """
    stored = tl.load(pointers) if is_loaded is None else tl.load(pointers, mask=is_loaded, other=0)
    if stored.dtype == tl.uint8:
        stored = from_e4m3(stored.to(tl.uint16), DTYPE, IS_VALUE)
    return stored


@triton.jit(do_not_specialize=["num_seqs", "max_blocks", "max_splits"])
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_starts,
    context_lens,
    sinks,
    kv_scales,
    out,
    split_sums,
    split_stats,
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
    IS_SPLIT: tl.constexpr,
):
    """Compute every n-th split of a tile, from split i on, in program (tile, KV head, i); store them if IS_SPLIT."""
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP_PAD
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a prompt have most keys: start them first
    kv_head = tl.program_id(1)
    seq, token, position, num_left = find_tile(query_starts, context_lens, num_seqs, tile, TILE_TOKENS)
    if num_left <= 0:
        return

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, D_PAD)
    in_row = rows // GROUP_PAD
    is_row = (in_row < num_left) & (rows % GROUP_PAD < GROUP)
    positions = position + in_row
    out_rows = (token + in_row).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP_PAD
    is_value = is_row[:, None] & (dims < D)[None, :]
    queries = tl.load(q + out_rows[:, None] * D + dims[None, :], mask=is_value, other=0.0)

    table = block_tables + seq.to(tl.int64) * max_blocks
    end = position + tl.minimum(num_left, TILE_TOKENS)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(position - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS

    if kv_scales is not None:
        scale *= tl.load(kv_scales + kv_head)
        value_scale = tl.load(kv_scales + KV_HEADS + kv_head)
    last_column = (end - 1) // BLOCK_SIZE
    in_tile = tl.arange(0, TILE_KEYS)
    of_head = kv_head * (BLOCK_SIZE * D) + (in_tile % BLOCK_SIZE * D)[:, None] + dims[None, :]
    row_max, row_sum = first_state(sinks, kv_head * GROUP + rows % GROUP_PAD, is_row)
    sums = tl.zeros([TILE_ROWS, D_PAD], tl.float32)
    for split in range(begin // SPLIT_KEYS + tl.program_id(2), tl.cdiv(end, SPLIT_KEYS), tl.num_programs(2)):
        new_max = tl.full([TILE_ROWS], LOWEST, tl.float32)
        new_row_sum = tl.zeros([TILE_ROWS], tl.float32)
        new_sums = tl.zeros([TILE_ROWS, D_PAD], tl.float32)
        stop = tl.minimum(split * SPLIT_KEYS + SPLIT_KEYS, end)
        for start in range(tl.maximum(split * SPLIT_KEYS, begin), stop, TILE_KEYS):
            # A slot not yet written may hold NaN. Its score is dropped, but NaN times a weight of 0 would be NaN, so
            # values after the last key are not read. Of bytes the last key is read again: their conversion leaves no
            # registers on compute capability 10.0 for places that are the same in every tile.
            is_key = (in_tile < stop - start)[:, None]
            if kv_scales is not None:
                keys = tl.minimum(start + in_tile, end - 1)
                if BLOCK_SIZE >= TILE_KEYS:
                    block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
                else:
                    block = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
                slots = (block * KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
                offsets = slots[:, None] * D + dims[None, :]
            elif BLOCK_SIZE >= TILE_KEYS:
                block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
                offsets = block * (KV_HEADS * BLOCK_SIZE * D) + start % BLOCK_SIZE * D + of_head
            else:
                column = tl.minimum(start // BLOCK_SIZE + in_tile // BLOCK_SIZE, last_column)
                block = tl.load(table + column).to(tl.int64)
                offsets = block[:, None] * (KV_HEADS * BLOCK_SIZE * D) + of_head

            is_dim = None if D == D_PAD else (dims < D)[None, :]
            k = _load(k_cache + offsets, is_dim, queries.dtype, False)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
            is_visible = in_tile[None, :] <= (positions - start)[:, None]
            if WINDOW is not None:
                is_visible = is_visible & (in_tile[None, :] > (positions - start - WINDOW)[:, None])
            scores = tl.where(is_visible, scores, float("-inf"))

            if kv_scales is not None:
                v = _load(v_cache + offsets, is_dim, queries.dtype, True)
            else:
                v = _load(v_cache + offsets, is_key if D == D_PAD else is_key & is_dim, queries.dtype, True)
            # The largest of the scaled scores is the largest score, scaled: rounding keeps their order.
            larger_max = tl.maximum(new_max, tl.max(scores, axis=1) * scale)
            rescale = tl.exp2(new_max - larger_max)
            negative_max = tl.broadcast_to(-larger_max[:, None], scores.shape)
            weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), negative_max))
            new_row_sum = tl.fma(new_row_sum, rescale, tl.sum(weights, axis=1))
            new_sums = tl.dot(weights.to(v.dtype), v, new_sums * rescale[:, None], input_precision="ieee")
            new_max = larger_max
        if kv_scales is not None:
            new_sums *= value_scale
        if IS_SPLIT:
            offsets = out_rows * max_splits + split
            tl.store(split_stats + offsets * 2, new_max, mask=is_row)
            tl.store(split_stats + offsets * 2 + 1, new_row_sum, mask=is_row)
            tl.store(split_sums + offsets[:, None] * D + dims[None, :], new_sums, mask=is_value)
        else:
            row_max, row_sum, sums = merge_states(row_max, row_sum, sums, new_max, new_row_sum, new_sums)
    if not IS_SPLIT:
        result = sums * (1.0 / tl.where(is_row, row_sum, 1.0))[:, None]
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
    sinks: Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Compute `paged_attention` slowly and obviously, one sequence at a time; undefined results are zeros."""
    if kv_scales is not None:
        k_cache, v_cache = kv_scales.dequantize(k_cache, 0), kv_scales.dequantize(v_cache, 1)
    out = torch.zeros_like(q)
    block_size = k_cache.shape[2]
    heads_per_kv = q.shape[1] // k_cache.shape[1]
    starts = query_starts.tolist()
    for start, stop, end, table in zip(starts, starts[1:], context_lens.tolist(), block_tables, strict=False):
        if start == stop:
            continue
        blocks = table[: cdiv(end, block_size)].long()
        k, v = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:end].float().repeat_interleave(heads_per_kv, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), k) * scale
        keys = torch.arange(end, device=q.device)
        distance = keys[end - (stop - start) :, None] - keys
        masked = distance < 0
        if sliding_window is not None:
            masked |= distance >= sliding_window
        scores = scores.masked_fill(masked, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, stop - start, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :end]
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return both kinds of launch for the models, at the block sizes in use."""
    variants = []
    models = (
        ("phi-3.5-moe", "bf16", 32, 8, 128, None, False),
        ("phixtral-4x2_8", "fp16", 32, 32, 80, None, False),
        ("mixtral-8x7b", "bf16", 32, 8, 128, 4096, False),
        ("phi-tiny-moe", "bf16", 16, 4, 128, None, False),
        ("qwen3-30b-a3b", "bf16", 32, 4, 128, None, False),
        ("granite-3.1-1b-a400m", "bf16", 16, 8, 64, None, False),
        ("gpt-oss-20b", "bf16", 64, 8, 64, None, True),
        ("gpt-oss-20b window", "bf16", 64, 8, 64, 128, True),
        ("phi-3.5-moe fp32", "fp32", 32, 8, 128, None, False),
        ("phixtral-4x2_8 fp32", "fp32", 32, 32, 80, None, False),
    )
    for (name, dtype, heads, kv_heads, head_dim, window, has_sinks), is_fp8 in product(models, (False, True)):
        constexprs = _head_constexprs(kv_heads, heads // kv_heads, head_dim, window)
        constexprs |= {} if has_sinks else {"sinks": None}
        itemsize = 4 if dtype == "fp32" else 2
        tables = {"query_starts": "*i32:16", "context_lens": "*i32:16", "num_seqs": "i32", "max_splits": "i32"}
        tables |= {"sinks": "*fp32:16"}
        name += " fp8" if is_fp8 else ""
        for block_size, is_split in product((16, 64), (False, True)):
            kind = "*fp32:16" if is_split else f"*{dtype}:16"
            variants.append(
                Variant(
                    f"paged_attention {name} block {block_size}{' split' if is_split else ''}",
                    _attention_kernel,
                    dict.fromkeys(("q", "out"), f"*{dtype}:16")
                    | dict.fromkeys(("k_cache", "v_cache"), "*u8:16" if is_fp8 else f"*{dtype}:16")
                    | tables
                    | {"kv_scales": "*fp32:16"}
                    | {"block_tables": "*i32:16", "max_blocks": "i32", "scale": "fp32"}
                    | {"split_sums": kind, "split_stats": kind},
                    constexprs
                    | ({} if is_fp8 else {"kv_scales": None})
                    | {"BLOCK_SIZE": block_size, "TILE_ROWS": TILE_ROWS, "TILE_KEYS": TILE_KEYS, "IS_SPLIT": is_split},
                    num_warps=_num_warps(gpu, itemsize),
                    num_stages=_num_stages(itemsize),
                    wants_wgmma=dtype != "fp32",
                    may_spill=dtype == "fp32",
                )
            )
        if is_fp8:
            continue  # splits are merged in fp32 alike
        for splits in (1, MANY_SPLITS):
            options = merge_options(heads // kv_heads, head_dim, splits)
            num_warps = options.pop("num_warps")
            variants.append(
                Variant(
                    f"paged_attention merge {name}{'' if splits == 1 else ' of many'}",
                    merge_splits_kernel,
                    tables | {"split_sums": "*fp32:16", "split_stats": "*fp32:16", "out": f"*{dtype}:16"},
                    constexprs | options,
                    num_warps,
                )
            )
    return variants
