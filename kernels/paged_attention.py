"""Attention over a paged KV cache, for decode steps, prefill chunks and mixes of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    slot_mapping: Tensor

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
    ) -> "AttentionBatch":
        """Precompute a step's indices, `slot_mapping` [num_tokens] for `write_kv` included."""
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
        )


def new_kv_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return one layer's keys or values: [num_kv_heads, num_blocks, block_size, head_dim], zeros (unused slots are
    read under a zero weight, so they must be finite)."""
    return torch.zeros(num_kv_heads, num_blocks, block_size, head_dim, dtype=dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put this step's keys and values into their slots.

    k, v:             [num_tokens, num_kv_heads, head_dim]
    k_cache, v_cache: [num_kv_heads, num_blocks, block_size, head_dim], written in place
    slot_mapping:     [num_tokens] int64, block * block_size + offset
    """
    k_cache.flatten(1, 2)[:, slot_mapping] = k.transpose(0, 1)
    v_cache.flatten(1, 2)[:, slot_mapping] = v.transpose(0, 1)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v for every query, causal, scores and softmax in fp32.

    q:              [num_tokens, num_heads, head_dim]
    sliding_window: keys a query sees, itself included; None = all
    returns:        [num_tokens, num_heads, head_dim], dtype of q
    """
    return paged_attention_ref(q, k_cache, v_cache, batch, scale, sliding_window)


def paged_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Slow and obvious `paged_attention`: one sequence at a time, everything in fp32."""
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[0]
    start = 0
    for n, end, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        blocks = torch.tensor(table, dtype=torch.int64)
        k = k_cache[:, blocks].flatten(1, 2)[:, :end].float().repeat_interleave(group, dim=0)
        v = v_cache[:, blocks].flatten(1, 2)[:, :end].float().repeat_interleave(group, dim=0)
        scores = q[start : start + n].transpose(0, 1).float() @ k.transpose(1, 2) * scale
        distance = torch.arange(end - n, end)[:, None] - torch.arange(end)
        hidden = distance < 0
        if sliding_window is not None:
            hidden = hidden | (distance >= sliding_window)
        scores = scores.masked_fill(hidden, float("-inf"))
        out[start : start + n] = (scores.softmax(dim=-1) @ v).transpose(0, 1).to(q.dtype)
        start += n
    return out
