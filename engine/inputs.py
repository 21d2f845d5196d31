"""ModelInputs: one step's tokens as the model wants them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.scheduler import Scheduled
from kernels.cpu.paged_attention import AttentionBatch


@dataclass(frozen=True)
class ModelInputs:
    """The tokens of all scheduled sequences, one after the other.

    input_ids, positions, rope_sets:  [num_tokens] int64
    attention:  where this step's keys go and which keys each token sees
    """

    input_ids: Tensor
    positions: Tensor
    rope_sets: Tensor
    attention: AttentionBatch


def build_inputs(scheduled: SequenceOf[Scheduled], block_size: int) -> ModelInputs:
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
    attention = AttentionBatch.build(
        query_lens=[item.num_tokens for item in scheduled],
        context_lens=[item.seq.num_computed_tokens + item.num_tokens for item in scheduled],
        block_tables=[item.seq.block_table for item in scheduled],
        block_size=block_size,
    )
    return ModelInputs(torch.tensor(input_ids), torch.tensor(positions), torch.tensor(rope_sets), attention)
