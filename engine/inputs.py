"""ModelInputs: one step's tokens as the model wants them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import Device
from engine.scheduler import Scheduled
from kernels.cpu.paged_attention import AttentionBatch


@dataclass(frozen=True)
class PagedBatch:
    """What one step attends to, as the GPU's kernels read it.

    block_tables: [num_seqs, max_blocks] int32
    query_starts: [num_seqs + 1] int32, each sequence's first token of the step; at the end the number of tokens
    context_lens: [num_seqs] int32, keys of each sequence, this step's included
    slots:        [num_tokens] int64, where each token's key goes: block * block_size + place in it
    """

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    slots: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """The tokens of all scheduled sequences, one after the other.

    input_ids, positions, rope_sets:  [num_tokens] int64
    attention:  where this step's keys go and which keys each token sees
    """

    input_ids: Tensor
    positions: Tensor
    rope_sets: Tensor
    attention: AttentionBatch | PagedBatch


def build_inputs(scheduled: SequenceOf[Scheduled], block_size: int, device: Device) -> ModelInputs:
    """Lay out a step: the next num_tokens tokens of each sequence, with their positions and rope sets."""
    input_ids: list[int] = []
    positions: list[int] = []
    rope_sets: list[int] = []
    for item in scheduled:
        sequence, start = item.seq, item.seq.num_computed_tokens
        span = range(start, start + item.num_tokens)
        input_ids += sequence.token_ids[span.start : span.stop]
        positions += span
        rope_sets += [sequence.rope_set] * len(span)
    query_lens = [item.num_tokens for item in scheduled]
    context_lens = [item.seq.num_computed_tokens + item.num_tokens for item in scheduled]
    block_tables = [item.seq.block_table for item in scheduled]
    tokens, token_positions, token_rope_sets = torch.tensor((input_ids, positions, rope_sets), device=device.torch)
    build = _paged_batch if device.backend == "triton" else AttentionBatch.build
    attention = build(query_lens, context_lens, block_tables, block_size)
    if isinstance(attention, PagedBatch):
        attention = PagedBatch(*(tensor.to(device.torch) for tensor in vars(attention).values()))
    return ModelInputs(tokens, token_positions, token_rope_sets, attention)


def _paged_batch(
    query_lens: SequenceOf[int],
    context_lens: SequenceOf[int],
    block_tables: SequenceOf[SequenceOf[int]],
    block_size: int,
) -> PagedBatch:
    widest = max(map(len, block_tables))
    slots = [
        table[position // block_size] * block_size + position % block_size
        for n, end, table in zip(query_lens, context_lens, block_tables, strict=True)
        for position in range(end - n, end)
    ]
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PagedBatch(
        torch.tensor([[*table, *[0] * (widest - len(table))] for table in block_tables], dtype=torch.int32),
        starts,
        torch.tensor(context_lens, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int64),
    )
