"""Attention over a paged KV cache on the CPU: decode steps, prefill chunks and mixes of both, one op.

Queries are cut into tiles, keys into runs at fixed positions. A tile meets its runs one after the other with a running
softmax, in fp32. What a row adds, and in which order, is fixed by its position alone. So a query's result is bitwise
the same whatever chunk it comes in, whatever stands beside it and however many blocks lie behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numba import float32
from torch import Tensor

from kernels.cpu.compiled import array, compiled, exp, fma, inlined, narrow, widen
from kernels.cpu.cores import each_on_one_core, num_cores

RUN_KEYS = 64
TILE_TOKENS = 16  # of a sequence that share one read of the keys
LANES = 16  # sums and maxima are taken in so many parts: the numbers of the widest vectors
ROWS = 4  # of queries that are multiplied together
HIDDEN = float32(-1e30)  # a score: its weight is 0
FEW_PRODUCTS = 2**22  # take less than waking another core
PIECES_PER_CORE = 4


@dataclass(frozen=True)
class AttentionBatch:
    """What one step attends to. Built once a step on the host, read by every layer.

    Tokens of a step stand one sequence after the other: sequence i has query_lens[i] of them, the last of its
    context_lens[i] keys (this step's included). block_tables[i] names its blocks in order.

    slots:  [num_tokens] int64, where each token's key goes: block * block_size + place in it
    tiles:  [num_tiles, 4] int64: sequence, first token of the step, its position, tokens
    tables: [num_sequences, most blocks] int64
    ends:   of each tile, so many (query, key) pairs lie in it and before it
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    block_size: int
    slots: Tensor
    tiles: Tensor
    tables: Tensor
    ends: tuple[int, ...]

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
    ) -> "AttentionBatch":
        """Lay out a step."""
        slots: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        for i, (n, end, table) in enumerate(zip(query_lens, context_lens, block_tables, strict=True)):
            for first in range(end - n, end, TILE_TOKENS):
                tiles.append((i, len(slots), first, min(TILE_TOKENS, end - first)))
                slots += [
                    table[p // block_size] * block_size + p % block_size for p in range(first, first + tiles[-1][3])
                ]
        most = max(map(len, block_tables), default=0)
        return cls(
            tuple(query_lens),
            tuple(context_lens),
            tuple(tuple(t) for t in block_tables),
            block_size,
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor(tiles, dtype=torch.int64).view(-1, 4),
            torch.tensor([[*table, *[0] * (most - len(table))] for table in block_tables], dtype=torch.int64),
            tuple(accumulate((first + n) * n for _, _, first, n in tiles)),
        )


def new_key_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's keys, [num_blocks, num_kv_heads, block_size, head_dim], zeros: those of a block side by side
    in memory, number by number, so that a query meets them all at once."""
    return torch.zeros(num_blocks, num_kv_heads, head_dim, block_size, dtype=dtype).transpose(2, 3)


def new_value_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's values, [num_blocks, num_kv_heads, block_size, head_dim], zeros."""
    return torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, causal, all of it in fp32.

    q:              [num_tokens, num_heads, head_dim]
    k_cache:        made by new_key_cache
    sliding_window: keys a query sees, itself included; None = all
    returns:        [num_tokens, num_heads, head_dim], dtype of q
    """
    num_kv_heads = k_cache.shape[1]
    out = torch.empty_like(q)
    arrays = [array(t) for t in (q, k_cache.transpose(2, 3), v_cache, out, batch.tiles, batch.tables)]
    pieces = _cut(batch.ends, num_kv_heads, q.shape[1] * q.shape[2])

    def attend(i: int) -> None:
        _attend(*arrays, *pieces[i], np.float32(scale), sliding_window or 0)

    each_on_one_core(attend, range(len(pieces)))
    return out


def _cut(ends: Sequence[int], num_kv_heads: int, width: int) -> list[tuple[int, int]]:
    """Cut the work, each tile's kv heads one after the other, into parts of about equal size."""
    if not ends:
        return []
    num_pieces = 1 if ends[-1] * width < FEW_PRODUCTS else num_cores() * PIECES_PER_CORE
    cuts, tile, begin = [0], 0, 0
    for i in range(1, num_pieces):
        at = ends[-1] * i / num_pieces
        while ends[tile] <= at:
            tile, begin = tile + 1, ends[tile]
        cuts.append(tile * num_kv_heads + int((at - begin) / (ends[tile] - begin) * num_kv_heads))
    return [(a, b) for a, b in pairwise([*cuts, len(ends) * num_kv_heads]) if a < b]


@compiled
def _attend(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    out: Any,
    tiles: Any,
    tables: Any,
    start: int,
    stop: int,
    scale: Any,
    window: int,
) -> None:
    """Parts start .. stop - 1 of the work: part i is kv head i % num_kv_heads of tile i // num_kv_heads.

    k_cache: [num_blocks, num_kv_heads, head_dim, block_size]; the others as above
    window:  0 = none
    """
    num_kv_heads, head_dim, block_size = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    run_blocks = max(1, RUN_KEYS // block_size)
    run_keys = run_blocks * block_size
    most_rows = TILE_TOKENS * group + ROWS - 1
    most_keys = -(-run_keys // LANES) * LANES
    depth = -(-head_dim // ROWS) * ROWS
    keys = np.zeros((depth, most_keys), np.float32)
    values = np.zeros((most_keys, head_dim), np.float32)
    queries = np.zeros((most_rows, depth), np.float32)
    sums = np.zeros((most_rows, head_dim), np.float32)
    weights = np.zeros((most_rows, most_keys), np.float32)
    top = np.zeros(most_rows, np.float32)
    total = np.zeros(most_rows, np.float32)
    lanes = np.zeros(LANES, np.float32)
    for part in range(start, stop):
        sequence, token, first, num_tokens = tiles[part // num_kv_heads]
        kv = part % num_kv_heads
        end = first + num_tokens
        num_rows = num_tokens * group
        for r in range(num_rows):
            for d in range(head_dim):
                queries[r, d] = widen(q[token + r // group, kv * group + r % group, d]) * scale
                sums[r, d] = float32(0.0)
            top[r], total[r] = HIDDEN, float32(0.0)
        first_run = max(0, first - window + 1) // run_keys if window > 0 else 0
        for base in range(first_run * run_keys, end, run_keys):
            num_keys = min(end - base, run_keys)
            width = -(-num_keys // LANES) * LANES
            _read(k_cache, v_cache, tables[sequence], kv, base // block_size, num_keys, width, keys, values)
            for r0 in range(0, num_rows, ROWS):
                weights[r0 : r0 + ROWS, :width] = float32(0.0)
                _multiply(queries, r0, keys, depth, width, weights)
                for r in range(r0, min(r0 + ROWS, num_rows)):
                    next_ = first + r // group + 1 - base  # the first key behind the query
                    hidden = next_ - window if window > 0 else 0
                    factor = _soften(weights[r], hidden, min(next_, num_keys), width, top, total, r, lanes)
                    for d in range(head_dim):
                        sums[r, d] *= factor
                _multiply(weights, r0, values, width, head_dim, sums)
        for r in range(num_rows):
            share = float32(1.0) / total[r]
            for d in range(head_dim):
                at = token + r // group, kv * group + r % group, d
                out[at] = narrow(sums[r, d] * share, out[at])


@inlined
def _read(
    k_cache: Any, v_cache: Any, table: Any, kv: int, block: int, num_keys: int, width: int, keys: Any, values: Any
) -> None:
    """Bring a run's keys and values to fp32. Values past the last are 0; keys may be anything."""
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
def _soften(scores: Any, hidden: int, seen: int, width: int, top: Any, total: Any, r: int, lanes: Any) -> Any:
    """Turn a row's scores into weights, exp(score - the largest so far), 0 but for keys hidden .. seen - 1.

    Returns what the weights of the runs before must be multiplied with.
    """
    for j in range(min(max(hidden, 0), width)):
        scores[j] = HIDDEN
    for j in range(max(seen, 0), width):
        scores[j] = HIDDEN
    lanes[:] = top[r]
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
            weight = float32(0.0) if score == HIDDEN else exp(score - largest)
            scores[i + j] = weight
            lanes[j] += weight
    sum_ = lanes[0]
    for j in range(1, LANES):
        sum_ += lanes[j]
    factor = exp(top[r] - largest)
    top[r], total[r] = largest, fma(total[r], factor, sum_)
    return factor


@inlined
def _multiply(a: Any, r: int, b: Any, n: int, width: int, out: Any) -> None:
    """Add a[r : r + 4, :n] @ b[:n, :width] to out[r : r + 4, :width], n a multiple of 4, one product after the other.

    Each number read serves four sums and each sum, four products: that keeps the CPU multiplying.
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
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Slow and obvious `paged_attention`: one sequence at a time."""
    out = torch.empty_like(q)
    heads_per_kv = q.shape[1] // k_cache.shape[1]
    start = 0
    for n, end, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        k, v = (
            cache[list(table)].transpose(1, 2).flatten(0, 1)[:end].float().repeat_interleave(heads_per_kv, dim=1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start : start + n].float(), k) * scale
        distance = torch.arange(end - n, end)[:, None] - torch.arange(end)
        hidden = distance < 0
        if sliding_window is not None:
            hidden = hidden | (distance >= sliding_window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start : start + n] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        start += n
    return out
