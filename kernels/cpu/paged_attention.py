"""Attention over a paged KV cache on the CPU: one operation for decode steps, prefill chunks and mixes of both.

Queries are split into tiles, and keys into runs at fixed positions. A tile processes its runs one after the other with
an online softmax, in fp32. The numbers that a row adds up, and their order, depend on its position alone. So a query's
result is bitwise the same whatever its chunk, the other queries of the step and the number of blocks after it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, uint32, uint64
from torch import Tensor

from moray.kernels.cpu.job_pool import pool_of, run_job
from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import (
    CFunction,
    array_at,
    as_float,
    bits_of,
    exp,
    fma,
    inlined,
    keep,
    narrow,
    widen,
)
from moray.kernels.cpu.thread_pool import num_cores
from moray.kernels.cpu.vectors import address_of
from moray.kernels.e4m3 import KvScales

RUN_KEYS = 64  # keys in a run, or one block if a block is larger
TILE_TOKENS = 16  # tokens of a sequence that share one read of the keys
LANES = 16  # partial sums and maxima of a row: as many as the widest vectors have numbers
ROWS = 4  # query rows that are multiplied together
MASKED = float32(-1e30)  # the score of a masked key, whose weight is 0
MIN_SHARED_PRODUCTS = 2**19  # fewer multiplications take less time than sharing them among cores
PIECES_PER_CORE = 4  # pieces of work per core, so that cores that other processes use too can do less


@dataclass(frozen=True)
class CpuAttentionMetadata:
    """Locates the keys and values for attention of one step. Built once per step, read by every layer.

    The tokens of a step are ordered sequence by sequence.

    slots:        [num_tokens] int64, where each token's key is written: block * block_size + position in the block
    tiles:        [num_tiles, 4] int64: where the sequence's blocks begin in `tables`, first token in the step, position
                  of that token, number of tokens
    tables:       int32, the blocks of all sequences in order, one sequence after the other. Nothing is padded: one long
                  context beside many short ones costs its own length
    """

    slots: Tensor
    tiles: Tensor
    tables: Tensor

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
    ) -> "CpuAttentionMetadata":
        """Build the metadata of a step.

        query_lens:   the tokens of each sequence
        context_lens: its keys, of which the last are those of these tokens
        block_tables: its blocks
        """
        slots: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        tables = array("i")
        for n, end, table in zip(query_lens, context_lens, block_tables, strict=True):
            table_start = len(tables)
            tables.extend(table)
            for first in range(end - n, end, TILE_TOKENS):
                tiles.append((table_start, len(slots), first, min(TILE_TOKENS, end - first)))
                slots += [
                    table[p // block_size] * block_size + p % block_size for p in range(first, first + tiles[-1][3])
                ]
        return cls(
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor(tiles, dtype=torch.int64).view(-1, 4),
            torch.frombuffer(tables, dtype=torch.int32),
        )


def new_key_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's keys as zeros, [num_blocks, num_kv_heads, block_size, head_dim].

    In memory the head dimension comes before the block dimension, so that a query is multiplied with all keys of a
    block at once.
    """
    return torch.zeros(num_blocks, num_kv_heads, head_dim, block_size, dtype=dtype).transpose(2, 3)


def new_value_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's values as zeros, [num_blocks, num_kv_heads, block_size, head_dim]."""
    return torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: CpuAttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, with causal masking, computed in fp32.

    q:              [num_tokens, num_heads, head_dim]
    k_cache:        from new_key_cache
    v_cache:        from new_value_cache
    sliding_window: number of keys that a query attends to, its own included; None = all
    sinks:          [num_heads] fp32, a score of each head that has a weight in the softmax and no value; it is not
                    scaled. None = there are none
    kv_scales:      of caches of float8_e4m3fn; None = the caches have the dtype of q
    returns:        [num_tokens, num_heads, head_dim], dtype of q
    """
    tiles, tables = metadata.tiles, metadata.tables
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    assert q.is_contiguous() and k_cache.stride(3) == block_size and v_cache.is_contiguous()
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == q.shape[1:2] and sinks.is_contiguous())
    assert (k_cache.dtype == torch.float8_e4m3fn) == (kv_scales is not None), f"a cache of {k_cache.dtype}"
    out = torch.empty_like(q)
    cores = num_cores()
    arguments = (
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        tiles.data_ptr(),
        tables.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        0 if kv_scales is None else kv_scales.scales.data_ptr(),
        0,
        q.shape[0],
        q.shape[1],
        tiles.shape[0],
        tables.shape[0],
        num_blocks,
        num_kv_heads,
        block_size,
        head_dim,
        bits_of(scale),
        sliding_window or 0,
        pool_of(cores),
        cores * PIECES_PER_CORE if cores > 1 else 1,
        MIN_SHARED_PRODUCTS,
        _ATTEND[q.dtype, kv_scales is not None].address,
    )
    launch(_ATTENTION, arguments, reports=True)
    return out


# The arguments: addresses, sizes, the scale's bits and the window, see paged_attention; how the work is shared; and the
# report. The pieces get a copy with BOUNDS, the address of what _split_work returns: it is 0 here.
Q, K, V, OUT, TILES, TABLES, SINKS, KV_SCALES, BOUNDS = range(9)
NUM_TOKENS, NUM_HEADS, NUM_TILES, NUM_TABLE_BLOCKS = range(9, 13)
NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, SCALE, WINDOW = range(13, 19)
POOL, MAX_PIECES, MIN_SHARED, ATTEND, REPORT = range(19, 24)
WORDS = 24


def _attention(arguments: Any, piece: Any) -> None:
    """Split the work, which depends on what the tiles hold, and do it."""
    given = array_at(arguments, (WORDS,), np.uint64)
    words = given.copy()
    bounds = _split_work(
        array_at(words[TILES], (np.int64(words[NUM_TILES]), 4), np.int64),
        np.int64(words[NUM_KV_HEADS]),
        np.int64(words[NUM_HEADS] * words[HEAD_DIM]),
        np.int64(words[MIN_SHARED]),
        np.int64(words[MAX_PIECES]),
    )
    words[BOUNDS] = address_of(bounds)
    run_job(words[POOL], words[ATTEND], address_of(words), uint64(len(bounds) - 1))
    given[REPORT] = 1
    keep(words)
    keep(bounds)


_ATTENTION = CFunction(_attention)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _split_work(tiles: Any, num_kv_heads: int, width: int, min_shared_products: int, max_pieces: int) -> Any:
    """Split the work into pieces of about equal size.

    The work consists of parts: each kv head of each tile, tile by tile. Returns the first part of each piece, and the
    end of the last.
    """
    total = 0  # (query, key) pairs
    for i in range(len(tiles)):
        total += (tiles[i, 2] + tiles[i, 3]) * tiles[i, 3]
    num_pieces = 1 if total * width < min_shared_products else max_pieces
    bounds = np.zeros(num_pieces + 1, np.int64)
    tile, begin, end = -1, 0, 0
    for i in range(1, num_pieces):
        at = total * i / num_pieces
        while end <= at:
            tile, begin = tile + 1, end
            end += (tiles[tile, 2] + tiles[tile, 3]) * tiles[tile, 3]
        bounds[i] = tile * num_kv_heads + np.int64((at - begin) / (end - begin) * num_kv_heads)
    bounds[num_pieces] = len(tiles) * num_kv_heads
    return bounds


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _attend_piece(arguments: Any, piece: Any, stored: Any, cached: Any) -> None:
    words = array_at(arguments, (WORDS,), np.uint64)
    num_heads, num_kv_heads = np.int64(words[NUM_HEADS]), np.int64(words[NUM_KV_HEADS])
    block_size, head_dim = np.int64(words[BLOCK_SIZE]), np.int64(words[HEAD_DIM])
    num_tokens, num_blocks = np.int64(words[NUM_TOKENS]), np.int64(words[NUM_BLOCKS])
    bounds = array_at(words[BOUNDS] + uint64(8) * piece, (2,), np.int64)
    _attend(
        array_at(words[Q], (num_tokens, num_heads, head_dim), stored),
        array_at(words[K], (num_blocks, num_kv_heads, head_dim, block_size), cached),
        array_at(words[V], (num_blocks, num_kv_heads, block_size, head_dim), cached),
        array_at(words[OUT], (num_tokens, num_heads, head_dim), stored),
        array_at(words[TILES], (np.int64(words[NUM_TILES]), 4), np.int64),
        array_at(words[TABLES], (np.int64(words[NUM_TABLE_BLOCKS]),), np.int32),
        array_at(words[SINKS], (num_heads if words[SINKS] else 0,), np.float32),
        array_at(words[KV_SCALES], (2, num_kv_heads if words[KV_SCALES] else 0), np.float32),
        bounds[0],
        bounds[1],
        as_float(uint32(words[SCALE])),
        np.int64(words[WINDOW]),
    )


def _attend_bf16(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.uint16, np.uint16)


def _attend_f16(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.int16, np.int16)


def _attend_fp32(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.float32, np.float32)


def _attend_bf16_e4m3(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.uint16, np.uint8)


def _attend_f16_e4m3(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.int16, np.uint8)


def _attend_fp32_e4m3(arguments: Any, piece: Any) -> None:
    _attend_piece(arguments, piece, np.float32, np.uint8)


_ATTEND = {  # by the dtype of q, and whether the caches are of e4m3
    (torch.bfloat16, False): CFunction(_attend_bf16),
    (torch.float16, False): CFunction(_attend_f16),
    (torch.float32, False): CFunction(_attend_fp32),
    (torch.bfloat16, True): CFunction(_attend_bf16_e4m3),
    (torch.float16, True): CFunction(_attend_f16_e4m3),
    (torch.float32, True): CFunction(_attend_fp32_e4m3),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _attend(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    out: Any,
    tiles: Any,
    tables: Any,
    sinks: Any,
    kv_scales: Any,
    start: int,
    stop: int,
    scale: Any,
    window: int,
) -> None:
    """Compute parts start .. stop - 1 of the work: part i is kv head i % num_kv_heads of tile i // num_kv_heads.

    k_cache:   [num_blocks, num_kv_heads, head_dim, block_size]
    sinks:     [num_heads], or empty if there are none
    kv_scales: [2, num_kv_heads] of keys and of values, or empty if there are none
    window:    the sliding window; 0 = none
    """
    num_kv_heads, head_dim, block_size = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    run_blocks = max(1, RUN_KEYS // block_size)
    run_keys = run_blocks * block_size
    max_rows = TILE_TOKENS * group + ROWS - 1
    max_keys = -(-run_keys // LANES) * LANES
    depth = -(-head_dim // ROWS) * ROWS
    keys = np.zeros((depth, max_keys), np.float32)
    values = np.zeros((max_keys, head_dim), np.float32)
    queries = np.zeros((max_rows, depth), np.float32)
    sums = np.zeros((max_rows, head_dim), np.float32)
    weights = np.zeros((max_rows, max_keys), np.float32)
    row_max = np.zeros(max_rows, np.float32)
    row_sum = np.zeros(max_rows, np.float32)
    lanes = np.zeros(LANES, np.float32)
    for part in range(start, stop):
        table_start, token, first, num_tokens = tiles[part // num_kv_heads]
        kv = part % num_kv_heads
        end = first + num_tokens
        num_rows = num_tokens * group
        key_scale, value_scale = scale, float32(1.0)
        if len(kv_scales[0]) > 0:
            key_scale, value_scale = scale * kv_scales[0, kv], kv_scales[1, kv]
        for r in range(num_rows):
            for d in range(head_dim):
                queries[r, d] = widen(q[token + r // group, kv * group + r % group, d]) * key_scale
                sums[r, d] = float32(0.0)
            row_max[r], row_sum[r] = MASKED, float32(0.0)
        if len(sinks) > 0:  # a softmax begins with its sink, whose weight is exp(0)
            for r in range(num_rows):
                row_max[r], row_sum[r] = sinks[kv * group + r % group], float32(1.0)
        first_run = max(0, first - window + 1) // run_keys if window > 0 else 0
        for base in range(first_run * run_keys, end, run_keys):
            num_keys = min(end - base, run_keys)
            width = -(-num_keys // LANES) * LANES
            _load_run(k_cache, v_cache, tables[table_start:], kv, base // block_size, num_keys, width, keys, values)
            for r0 in range(0, num_rows, ROWS):
                weights[r0 : r0 + ROWS, :width] = float32(0.0)
                _multiply(queries, r0, keys, depth, width, weights)
                for r in range(r0, min(r0 + ROWS, num_rows)):
                    stop_key = first + r // group + 1 - base  # the first key after the query's own
                    start_key = stop_key - window if window > 0 else 0
                    factor = _online_softmax(
                        weights[r], start_key, min(stop_key, num_keys), width, row_max, row_sum, r, lanes
                    )
                    for d in range(head_dim):
                        sums[r, d] *= factor
                _multiply(weights, r0, values, width, head_dim, sums)
        for r in range(num_rows):
            scale_of_row = value_scale / row_sum[r]
            for d in range(head_dim):
                at = token + r // group, kv * group + r % group, d
                out[at] = narrow(sums[r, d] * scale_of_row, out[at])


@inlined
def _load_run(
    k_cache: Any, v_cache: Any, table: Any, kv: int, block: int, num_keys: int, width: int, keys: Any, values: Any
) -> None:
    """Convert a run's keys and values to fp32. Values after the last key are set to 0; keys there are arbitrary."""
    head_dim, block_size = k_cache.shape[2:]
    for b in range(-(-num_keys // block_size)):
        at = table[block + b]
        for d in range(head_dim):
            for j in range(block_size):
                keys[d, b * block_size + j] = widen(k_cache[at, kv, d, j])
        for j in range(min(block_size, num_keys - b * block_size)):
            for d in range(head_dim):
                values[b * block_size + j, d] = widen(v_cache[at, kv, j, d])
    values[num_keys:width] = float32(0.0)


@inlined
def _online_softmax(
    scores: Any, start_key: int, stop_key: int, width: int, row_max: Any, row_sum: Any, r: int, lanes: Any
) -> Any:
    """Convert a row's scores to weights, exp(score - the largest so far); only keys start_key .. stop_key - 1 count.

    Returns the factor that the weights of the previous runs must be multiplied with.
    """
    for j in range(min(max(start_key, 0), width)):
        scores[j] = MASKED
    for j in range(max(stop_key, 0), width):
        scores[j] = MASKED
    lanes[:] = row_max[r]
    for i in range(0, width, LANES):
        for j in range(LANES):
            lanes[j] = scores[i + j] if scores[i + j] > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(1, LANES):
        largest = lanes[j] if lanes[j] > largest else largest
    lanes[:] = float32(0.0)
    for i in range(0, width, LANES):
        for j in range(LANES):
            score = scores[i + j]
            weight = float32(0.0) if score == MASKED else exp(score - largest)
            scores[i + j] = weight
            lanes[j] += weight
    sum_ = lanes[0]
    for j in range(1, LANES):
        sum_ += lanes[j]
    factor = exp(row_max[r] - largest)
    row_max[r], row_sum[r] = largest, fma(row_sum[r], factor, sum_)
    return factor


@inlined
def _multiply(a: Any, r: int, b: Any, n: int, width: int, out: Any) -> None:
    """Add a[r : r + 4, :n] @ b[:n, :width] to out[r : r + 4, :width], one product after the other; n % 4 must be 0.

    Each number that is read is used in four sums, and each sum that is read gets four products, so that the CPU is busy
    multiplying rather than reading.
    """
    out0, out1, out2, out3 = out[r], out[r + 1], out[r + 2], out[r + 3]
    for i in range(0, n, 4):
        a00, a01, a02, a03 = a[r, i], a[r, i + 1], a[r, i + 2], a[r, i + 3]
        a10, a11, a12, a13 = a[r + 1, i], a[r + 1, i + 1], a[r + 1, i + 2], a[r + 1, i + 3]
        a20, a21, a22, a23 = a[r + 2, i], a[r + 2, i + 1], a[r + 2, i + 2], a[r + 2, i + 3]
        a30, a31, a32, a33 = a[r + 3, i], a[r + 3, i + 1], a[r + 3, i + 2], a[r + 3, i + 3]
        b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
        for j in range(width):
            x0, x1, x2, x3 = b0[j], b1[j], b2[j], b3[j]
            out0[j] = fma(a03, x3, fma(a02, x2, fma(a01, x1, fma(a00, x0, out0[j]))))
            out1[j] = fma(a13, x3, fma(a12, x2, fma(a11, x1, fma(a10, x0, out1[j]))))
            out2[j] = fma(a23, x3, fma(a22, x2, fma(a21, x1, fma(a20, x0, out2[j]))))
            out3[j] = fma(a33, x3, fma(a32, x2, fma(a31, x1, fma(a30, x0, out3[j]))))


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: CpuAttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    kv_scales: KvScales | None = None,
) -> Tensor:
    """Compute `paged_attention` slowly and obviously, one tile at a time."""
    if kv_scales is not None:
        k_cache, v_cache = kv_scales.dequantize(k_cache, 0), kv_scales.dequantize(v_cache, 1)
    out = torch.empty_like(q)
    heads_per_kv, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    for at, start, first, n in metadata.tiles.tolist():
        end = first + n
        table = metadata.tables[at : at - (-end // block_size)].long()
        k, v = (
            cache[table].transpose(1, 2).flatten(0, 1)[:end].float().repeat_interleave(heads_per_kv, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start : start + n].float(), k) * scale
        distance = torch.arange(first, end)[:, None] - torch.arange(end)
        hidden = distance < 0
        if sliding_window is not None:
            hidden = hidden | (distance >= sliding_window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, n, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :end]
        out[start : start + n] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out
