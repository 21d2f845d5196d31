"""Attention over a paged KV cache on the CPU: decode steps, prefill chunks and mixes of both, one op.

Queries are cut into tiles (one token of a decode, sixteen of a chunk), keys into runs at fixed positions. A tile meets
its runs one after the other with a running softmax, in fp32. So a query's result is bitwise the same whatever chunk it
comes in, whatever stands beside it and however many blocks lie behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.cores import each_on_one_core, num_cores
from kernels.cpu.exact_products import key_step, row_step

RUN_KEYS = 192  # MKL adds so many terms one after the other
KEY_STEPS = (16, 32, 64)  # a run's last keys are left out in one of these steps where no query sees them
TILE_TOKENS = 16  # tokens of a prefill chunk that share one read of the keys
GROUP_BYTES = 2**20  # of keys in fp32 at a time: what is read for one product is still in the cache for the next
HIDDEN = -1e30  # added to a score: its weight becomes exactly 0. Not -inf, of which a row of nothing else makes NaN.


@dataclass(frozen=True)
class Run:
    """One run of keys, of each tile in a group.

    cache_rows:  rows of the cache seen as [num_blocks * num_kv_heads, block_size * head_dim], by tile, head, block
    bias:        [num_tiles, 1, tile_tokens, 1, num_keys] fp32, 0 or HIDDEN; None = all zeros
    """

    cache_rows: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TileGroup:
    """Tiles of the same number of tokens that need the same runs, worked on together.

    tokens: [num_tiles, tile_tokens] which token of the step each query is; a short tile repeats its last
    """

    tokens: Tensor
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class AttentionBatch:
    """What one step attends to. Built once a step on the host, read by every layer.

    Tokens of a step stand one sequence after the other: sequence i has query_lens[i] of them, the last of its
    context_lens[i] keys (this step's included). block_tables[i] names its blocks in order.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    block_size: int
    slots: tuple[Tensor, Tensor]  # where each token's key goes: block, offset in it; [num_tokens] int64
    new_blocks: Tensor  # [num_new_blocks] int64, those whose first slot is written in this step
    _groups: dict[tuple[int, int, int | None], list[TileGroup]] = field(default_factory=dict, compare=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
    ) -> "AttentionBatch":
        """Lay out a step. The rest follows at the first layer's call, when the shape of the cache is known."""
        slots = [
            (table[p // block_size], p % block_size)
            for n, end, table in zip(query_lens, context_lens, block_tables, strict=True)
            for p in range(end - n, end)
        ]
        blocks, offsets = torch.tensor(slots, dtype=torch.int64).view(-1, 2).unbind(1)
        return cls(
            tuple(query_lens),
            tuple(context_lens),
            tuple(tuple(t) for t in block_tables),
            block_size,
            (blocks, offsets),
            blocks[offsets == 0],
        )

    def groups(self, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> list[TileGroup]:
        """The step's work, for all layers of this shape."""
        key = num_kv_heads, head_dim, sliding_window
        if key not in self._groups:
            self._groups[key] = list(_lay_out(self, num_kv_heads, head_dim, sliding_window))
        return self._groups[key]


@dataclass(frozen=True)
class _Tile:
    """first_token: in the step; block_table: of its sequence; the rest in positions of the sequence."""

    first_token: int
    first_position: int
    num_tokens: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        return self.first_position + self.num_tokens


def _lay_out(
    batch: AttentionBatch, num_kv_heads: int, head_dim: int, sliding_window: int | None
) -> Iterator[TileGroup]:
    run_keys = -(-RUN_KEYS // batch.block_size) * batch.block_size
    steps = [step for step in KEY_STEPS if step % batch.block_size == 0 and run_keys % step == 0]
    step = key_step(steps, run_keys, head_dim)
    most_keys = GROUP_BYTES // (num_kv_heads * head_dim * 4)

    def needed_runs(tile: _Tile) -> tuple[int, int]:
        first = 0 if sliding_window is None else max(0, tile.first_position - sliding_window + 1) // run_keys
        return first, -(-tile.end // run_keys)

    for tile_tokens, tiles in zip((1, TILE_TOKENS), _cut_queries(batch), strict=True):
        tiles.sort(key=lambda tile: (needed_runs(tile), tile.end))
        for (first, last), alike in groupby(tiles, key=needed_runs):
            for group in _cut_group(list(alike), most_keys, run_keys, step):
                stop = min(last * run_keys, -(-group[-1].end // step) * step)
                bounds = [(start, min(start + run_keys, stop)) for start in range(first * run_keys, stop, run_keys)]
                yield _lay_out_group(group, tile_tokens, bounds, batch.block_size, num_kv_heads, sliding_window)


def _cut_queries(batch: AttentionBatch) -> tuple[list[_Tile], list[_Tile]]:
    """Tiles of one token, and those of up to TILE_TOKENS."""
    singles, tiles = [], []
    token = 0
    for n, end, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        if n == 1:
            singles.append(_Tile(token, end - 1, 1, table))
        else:
            cuts = range(0, n, TILE_TOKENS)
            tiles += [_Tile(token + j, end - n + j, min(TILE_TOKENS, n - j), table) for j in cuts]
        token += n
    return singles, tiles


def _cut_group(tiles: list[_Tile], most_keys: int, run_keys: int, step: int) -> Iterator[list[_Tile]]:
    """Cut tiles, shortest first, so that a run of each group's has at most most_keys keys (or one tile)."""
    group: list[_Tile] = []
    for tile in tiles:
        if group and (len(group) + 1) * min(run_keys, -(-tile.end // step) * step) > most_keys:
            yield group
            group = []
        group.append(tile)
    yield group


def _lay_out_group(
    tiles: list[_Tile],
    tile_tokens: int,
    bounds: list[tuple[int, int]],
    block_size: int,
    num_kv_heads: int,
    sliding_window: int | None,
) -> TileGroup:
    offsets = torch.arange(tile_tokens)
    first_token, first_position, num_tokens = torch.tensor(
        [(tile.first_token, tile.first_position, tile.num_tokens) for tile in tiles]
    )[:, :, None].unbind(1)
    in_tile = torch.minimum(offsets, num_tokens - 1)
    positions = first_position + in_tile

    num_blocks = bounds[-1][1] // block_size
    table = torch.tensor([_padded(tile.block_table, num_blocks) for tile in tiles])
    heads = torch.arange(num_kv_heads)[:, None]
    runs = []
    for start, stop in bounds:
        blocks = table[:, start // block_size : stop // block_size]
        distance = positions[:, :, None] - torch.arange(start, stop)
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        bias = (hidden * HIDDEN)[:, None, :, None] if bool(hidden.any()) else None
        runs.append(Run((blocks[:, None] * num_kv_heads + heads).flatten(), bias))
    return TileGroup(first_token + in_tile, tuple(runs))


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    """Blocks past the sequence's own are read under a zero weight: its first stands in, as it is finite if it is."""
    return [*blocks[:length], *[blocks[0]] * (length - len(blocks))]


def new_kv_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """Return one layer's keys or values: [num_blocks, num_kv_heads, block_size, head_dim], zeros."""
    return torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """Put this step's keys and values into their slots.

    A block's slots are zeroed when its first one is written: those after the last key are read under a zero weight,
    and what another sequence left there may be NaN.

    k, v:             [num_tokens, num_kv_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], written in place
    """
    blocks, offsets = batch.slots
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.index_fill_(0, batch.new_blocks, 0)
        cache[blocks, :, offsets] = new


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, causal, all of it in fp32.

    q:              [num_tokens, num_heads, head_dim]
    sliding_window: keys a query sees, itself included; None = all
    returns:        [num_tokens, num_heads, head_dim], dtype of q
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = torch.empty_like(q)
    groups = batch.groups(num_kv_heads, head_dim, sliding_window)

    def attend(i: int) -> None:
        tokens = groups[i].tokens.flatten()
        tiles = q.index_select(0, tokens).view(*groups[i].tokens.shape, *q.shape[1:])
        out.index_copy_(0, tokens, _attend(tiles, k_cache, v_cache, groups[i], scale).to(q.dtype).flatten(0, 1))

    if len(groups) < num_cores():
        for i in range(len(groups)):
            attend(i)
    else:
        each_on_one_core(attend, range(len(groups)))
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: TileGroup, scale: float) -> Tensor:
    """q: [num_tiles, tile_tokens, num_heads, head_dim] -> the same shape, fp32"""
    num_tiles, tile_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    heads_per_kv = num_heads // num_kv_heads
    padding = -heads_per_kv % row_step(head_dim, RUN_KEYS) if tile_tokens == 1 else 0
    shape = num_tiles, num_kv_heads, tile_tokens, heads_per_kv + padding, -1

    q = q.float().mul_(scale).view(num_tiles, tile_tokens, num_kv_heads, heads_per_kv, head_dim).transpose(1, 2)
    q = F.pad(q, (0, 0, 0, padding)).reshape(num_tiles * num_kv_heads, -1, head_dim)
    state = None
    for run in group.runs:
        keys = _read(k_cache, run.cache_rows).view(len(q), -1, head_dim)
        scores = torch.bmm(q, keys.transpose(1, 2))
        if run.bias is not None:
            scores.view(shape).add_(run.bias)
        weights = scores.softmax(dim=-1)
        out = torch.bmm(weights, _read(v_cache, run.cache_rows).view(len(q), -1, head_dim))
        if len(group.runs) > 1:
            # The largest weight is 1 / the sum of exp(score - top).
            new = out, scores.amax(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True).reciprocal_()
            state = new if state is None else _merge(*state, *new)
    out = out if state is None else state[0]
    out = out.view(shape)[:, :, :, :heads_per_kv].transpose(1, 2)
    return out.reshape(num_tiles, tile_tokens, num_heads, head_dim)


def _read(cache: Tensor, rows: Tensor) -> Tensor:
    return cache.view(-1, cache.shape[2] * cache.shape[3]).index_select(0, rows).float()


def _merge(
    out: Tensor, top: Tensor, total: Tensor, new_out: Tensor, new_top: Tensor, new_total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join two parts of a softmax: weighted means of values, largest scores, sums of exp(score - largest).

    A part that is all hidden leaves the other as it is, bit by bit. (exp, not exp2: torch's exp2 has other bits for
    the last elements of a tensor, past the last full vector.)
    """
    both = torch.maximum(top, new_top)
    total = total.mul_(top.sub_(both).exp_())
    new_total.mul_(new_top.sub_(both).exp_())
    sum_ = total + new_total
    return out.mul_(total.div_(sum_)).add_(new_out.mul_(new_total.div_(sum_))), both, sum_


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
