"""ModelInputs: one step's tokens as the model wants them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import Device
from engine.scheduler import Scheduled
from engine.transfer import to_device
from kernels.cpu.paged_attention import AttentionBatch


@dataclass(frozen=True)
class PagedBatch:
    """What one step attends to, as the GPU's kernels read it.

    block_tables: [num_seqs, max_blocks] int32
    query_starts: [num_seqs + 1] int32, each sequence's first token of the step; at the end the number of tokens
    context_lens: [num_seqs] int32, keys of each sequence, this step's included
    slots:        [num_tokens] int64, where each token's key goes: block * block_size + place in it; -1: nowhere
    """

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    slots: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """The tokens of all scheduled sequences, one after the other.

    input_ids, positions, rope_sets:  [num_tokens] int64
    attention:   where this step's keys go and which keys each token sees
    num_tokens:  [1] int32: tokens from there on are padding; None: there is none
    """

    input_ids: Tensor
    positions: Tensor
    rope_sets: Tensor
    attention: AttentionBatch | PagedBatch
    num_tokens: Tensor | None = None


def build_inputs(
    scheduled: SequenceOf[Scheduled], block_size: int, device: Device, last_token_ids: Tensor | None = None
) -> ModelInputs:
    """Lay out a step: the next num_tokens tokens of each sequence, with their positions and rope sets.

    last_token_ids: those the last step sampled, on the device, for sequences whose newest is unread
    """
    input_ids: list[int] = []
    positions: list[int] = []
    rope_sets: list[int] = []
    unread: dict[int, int] = {}  # token of this step -> row of last_token_ids
    for item in scheduled:
        sequence, start = item.seq, item.seq.num_computed_tokens
        span = range(start, start + item.num_tokens)
        input_ids += sequence.token_ids[span.start : span.stop]
        if len(input_ids) == len(positions) + item.num_tokens - 1:
            assert sequence.unread is not None, f"sequence {sequence.seq_id} has no token {span.stop - 1}"
            unread[len(input_ids)] = sequence.unread
            input_ids.append(0)
        positions += span
        rope_sets += [sequence.rope_set] * len(span)
    query_lens = [item.num_tokens for item in scheduled]
    context_lens = [item.seq.num_computed_tokens + item.num_tokens for item in scheduled]
    block_tables = [item.seq.block_table for item in scheduled]
    build = paged_batch if device.backend == "triton" else _attention_batch
    tokens = to_device(input_ids, torch.int64, device.torch)
    if unread:
        assert last_token_ids is not None, f"no step sampled the tokens of {len(unread)} sequences"
        rows = to_device(list(unread.values()), torch.int64, device.torch)
        # One that could not be sampled (-1) ends its sequence when it is read; until then any token does.
        tokens[to_device(list(unread), torch.int64, device.torch)] = last_token_ids[rows].clamp(min=0)
    return ModelInputs(
        tokens,
        to_device(positions, torch.int64, device.torch),
        to_device(rope_sets, torch.int64, device.torch),
        build(query_lens, context_lens, block_tables, block_size, device.torch),
    )


def _attention_batch(
    query_lens: SequenceOf[int],
    context_lens: SequenceOf[int],
    block_tables: SequenceOf[SequenceOf[int]],
    block_size: int,
    device: torch.device,
) -> AttentionBatch:
    assert device.type == "cpu", f"the CPU's kernels on {device}"
    return AttentionBatch.build(query_lens, context_lens, block_tables, block_size)


def paged_batch(
    query_lens: SequenceOf[int],
    context_lens: SequenceOf[int],
    block_tables: SequenceOf[SequenceOf[int]],
    block_size: int,
    device: torch.device,
) -> PagedBatch:
    widest = max(map(len, block_tables))
    flat_tables: list[int] = []
    slots: list[int] = []
    starts = [0]
    for num_queries, end, table in zip(query_lens, context_lens, block_tables, strict=True):
        flat_tables += table
        flat_tables += [0] * (widest - len(table))
        slots += [table[p // block_size] * block_size + p % block_size for p in range(end - num_queries, end)]
        starts.append(starts[-1] + num_queries)
    return PagedBatch(
        to_device(flat_tables, torch.int32, device).view(len(block_tables), widest),
        to_device(starts, torch.int32, device),
        to_device(context_lens, torch.int32, device),
        to_device(slots, torch.int64, device),
    )
