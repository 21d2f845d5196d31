"""Attention over a paged KV cache on the CPU: decode steps, prefill chunks and mixes of both, one op.

Queries are cut into tiles (one token of a decode, sixteen of a chunk), keys into splits at fixed positions. Tiles meet
their splits one after the other with a running softmax, in fp32. So a query's result is bitwise the same whatever
chunk it comes in, whatever stands beside it and however many blocks lie behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.row_step import row_step

SPLIT_KEYS = 64  # least keys of a split; it grows with position, to an eighth or a quarter of what lies before
TILE_TOKENS = 16  # tokens of a prefill chunk that share one read of the keys
LONGEST_SPLIT = 64  # in units of SPLIT_KEYS: bounds the memory of one tile
WORKSPACE_BYTES = 16 * 2**20  # the keys of a tile group in fp32: less than the CPU's last cache
HIDDEN = -1e30  # added to a score: its weight becomes exactly 0. Not -inf, of which a row of nothing else makes NaN.


@dataclass(frozen=True)
class Piece:
    """One split of the keys against the tiles that reach into it.

    tiles:       a slice of the group's tiles
    cache_rows:  rows of the cache seen as [num_blocks * num_kv_heads, block_size * head_dim], by tile, head, block
    bias:        [num_tiles, 1, tile_tokens, 1, split] fp32, 0 or HIDDEN; None = all zeros
    """

    tiles: slice
    cache_rows: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TileGroup:
    """Tiles of the same number of tokens, worked on together.

    tokens: [num_tiles, tile_tokens] which token of the step each query is; a short tile repeats its last
    """

    tokens: Tensor
    pieces: tuple[Piece, ...]


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
    slot_mapping: Tensor  # [num_tokens] int64, block * block_size + offset
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
            table[p // block_size] * block_size + p % block_size
            for n, end, table in zip(query_lens, context_lens, block_tables, strict=True)
            for p in range(end - n, end)
        ]
        return cls(
            tuple(query_lens),
            tuple(context_lens),
            tuple(tuple(t) for t in block_tables),
            block_size,
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor([s // block_size for s in slots if s % block_size == 0], dtype=torch.int64),
        )

    def groups(self, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> list[TileGroup]:
        """The step's work, for all layers of this shape."""
        key = num_kv_heads, head_dim, sliding_window
        if key not in self._groups:
            self._groups[key] = list(_lay_out(self, num_kv_heads, head_dim, sliding_window))
        return self._groups[key]


@dataclass(frozen=True)
class _Tile:
    sequence: int
    first_token: int  # in the step
    first_position: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.first_position + self.num_tokens


def _lay_out(
    batch: AttentionBatch, num_kv_heads: int, head_dim: int, sliding_window: int | None
) -> Iterator[TileGroup]:
    singles, tiles = [], []
    token = 0
    for i, (n, end) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if n == 1:
            singles.append(_Tile(i, token, end - 1, 1))
        else:
            tiles += [_Tile(i, token + j, end - n + j, min(TILE_TOKENS, n - j)) for j in range(0, n, TILE_TOKENS)]
        token += n
    row_bytes = num_kv_heads * head_dim * 4
    for tile_tokens, of_size in ((1, singles), (TILE_TOKENS, tiles)):
        of_size.sort(key=lambda tile: -tile.end)
        while of_size:
            *_, (start, stop) = splits(of_size[0].end, batch.block_size, sliding_window)
            count = max(1, WORKSPACE_BYTES // (row_bytes * (stop - start)))
            yield _lay_out_group(batch, of_size[:count], tile_tokens, num_kv_heads, sliding_window)
            of_size = of_size[count:]


def splits(num_keys: int, block_size: int, sliding_window: int | None) -> Iterator[tuple[int, int]]:
    """Where the keys are cut: (start, stop) by position, the last one reaching to num_keys or beyond.

    Multiples of the block size. They follow from the position alone, which is what makes a query's result independent
    of the rest. A split is at most a quarter of the keys before it, so that little is read in vain, and there are few.
    Under a sliding window they stay at most as long as the window.
    """
    unit = -(-SPLIT_KEYS // block_size) * block_size
    longest = LONGEST_SPLIT if sliding_window is None else min(LONGEST_SPLIT, max(1, sliding_window // unit))
    position = 0
    while position < num_keys:
        length = min(max(1, 2 ** (position // unit).bit_length() // 8), longest) * unit
        yield position, position + length
        position += length


def _lay_out_group(
    batch: AttentionBatch, tiles: list[_Tile], tile_tokens: int, num_kv_heads: int, sliding_window: int | None
) -> TileGroup:
    offsets = torch.arange(tile_tokens)
    last = torch.tensor([tile.num_tokens - 1 for tile in tiles])
    in_tile = torch.minimum(offsets, last[:, None])
    tokens = torch.tensor([tile.first_token for tile in tiles])[:, None] + in_tile
    positions = torch.tensor([tile.first_position for tile in tiles])[:, None] + in_tile

    cuts = list(splits(tiles[0].end, batch.block_size, sliding_window))
    num_blocks = cuts[-1][1] // batch.block_size
    heads = torch.arange(num_kv_heads)[:, None]
    table = torch.tensor([_padded(batch.block_tables[tile.sequence], num_blocks) for tile in tiles])
    pieces = []
    for start, stop in cuts:
        reaching = [
            i
            for i, tile in enumerate(tiles)
            if tile.end > start and (sliding_window is None or tile.first_position - sliding_window + 1 < stop)
        ]
        if not reaching:
            continue
        part = slice(reaching[0], reaching[-1] + 1)
        blocks = table[part, start // batch.block_size : stop // batch.block_size]
        keys = torch.arange(start, stop)
        distance = positions[part, :, None] - keys
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        bias = (hidden * HIDDEN)[:, None, :, None] if bool(hidden.any()) else None
        rows = (blocks[:, None] * num_kv_heads + heads).flatten()
        pieces.append(Piece(part, rows, bias))
    return TileGroup(tokens, tuple(pieces))


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    """Blocks past the sequence's own are read under a zero weight: its first stands in, as it is finite if it is."""
    return [*blocks[:length], *[blocks[0]] * (length - len(blocks))]


def new_kv_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's keys or values: [num_blocks, num_kv_heads, block_size, head_dim], zeros."""
    return torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """Put this step's keys and values into their slots.

    A block's slots are zeroed when its first one is written: those after the last key are read under a zero weight,
    and what another sequence left there may be NaN.

    k, v:             [num_tokens, num_kv_heads, head_dim]
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], written in place
    """
    blocks = batch.slot_mapping // batch.block_size
    offsets = batch.slot_mapping % batch.block_size
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
    for group in batch.groups(num_kv_heads, head_dim, sliding_window):
        out[group.tokens] = _attend(q[group.tokens], k_cache, v_cache, group, scale).to(q.dtype)
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: TileGroup, scale: float) -> Tensor:
    """q: [num_tiles, tile_tokens, num_heads, head_dim] -> the same shape, fp32"""
    num_tiles, tile_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    heads_per_kv = num_heads // num_kv_heads
    padding = -heads_per_kv % row_step(head_dim, SPLIT_KEYS) if tile_tokens == 1 else 0
    rows = tile_tokens * (heads_per_kv + padding)

    q = q.view(num_tiles, tile_tokens, num_kv_heads, heads_per_kv, head_dim).transpose(1, 2) * scale
    q = F.pad(q.float(), (0, 0, 0, padding)).reshape(num_tiles, num_kv_heads, rows, head_dim)
    out = q.new_zeros(q.shape)
    top, total = q.new_full((*q.shape[:-1], 1), HIDDEN), q.new_zeros(*q.shape[:-1], 1)
    for piece in group.pieces:
        q_piece = q[piece.tiles]
        shape = len(q_piece) * num_kv_heads, -1, head_dim
        keys = _read(k_cache, piece.cache_rows).view(shape)
        scores = torch.bmm(q_piece.reshape(shape), keys.transpose(1, 2))
        if piece.bias is not None:
            scores.view(len(q_piece), num_kv_heads, tile_tokens, -1, keys.shape[1]).add_(piece.bias)
        new_top = scores.amax(dim=-1, keepdim=True)
        weights = scores.softmax(dim=-1)
        new_total = weights.amax(dim=-1, keepdim=True).reciprocal_()
        new_out = torch.bmm(weights, _read(v_cache, piece.cache_rows).view(shape))
        state = (t.view(len(q_piece), num_kv_heads, rows, -1) for t in (new_out, new_top, new_total))
        _merge(out[piece.tiles], top[piece.tiles], total[piece.tiles], *state)
    out = out.div_(total).view(num_tiles, num_kv_heads, tile_tokens, -1, head_dim)
    return out[:, :, :, :heads_per_kv].transpose(1, 2).reshape(num_tiles, tile_tokens, num_heads, head_dim)


def _read(cache: Tensor, rows: Tensor) -> Tensor:
    return cache.view(-1, cache.shape[2] * cache.shape[3]).index_select(0, rows).float()


def _merge(out: Tensor, top: Tensor, total: Tensor, new_out: Tensor, new_top: Tensor, new_total: Tensor) -> None:
    """Add a split to the running softmax, in place. A split that is all hidden changes no bit.

    exp, not exp2: torch's exp2 has other bits for the last elements of a tensor, past the last full vector.
    """
    both = torch.maximum(top, new_top)
    old_scale = top.sub_(both).exp_()
    new_total.mul_(new_top.sub_(both).exp_())
    total.mul_(old_scale).add_(new_total)
    out.mul_(old_scale).add_(new_out.mul_(new_total))
    top.copy_(both)


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
