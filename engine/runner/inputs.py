"""Build the inputs of a step from a schedule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moray.engine.backends.base import Backend
from moray.engine.backends.inputs import ModelInputs
from moray.engine.core.scheduler import Scheduled
from moray.engine.platform.transfer import to_device


def build_inputs(
    scheduled: Sequence[Scheduled], block_size: int, backend: Backend, last_token_ids: Tensor | None = None
) -> ModelInputs:
    """Build the inputs of a step: the scheduled tokens of each sequence, with their positions and rope sets.

    last_token_ids: the tokens that the last step sampled, on the device, for sequences whose newest token is unread
    """
    device = backend.torch_device
    input_ids: list[int] = []
    positions: list[int] = []
    rope_sets: list[int] = []
    pending_row: dict[int, int] = {}  # token of this step -> row of last_token_ids
    for item in scheduled:
        sequence, start = item.seq, item.seq.num_computed_tokens
        span = range(start, start + item.num_tokens)
        input_ids += sequence.token_ids[span.start : span.stop]
        if len(input_ids) == len(positions) + item.num_tokens - 1:
            assert sequence.pending_row is not None, f"sequence {sequence.seq_id} has no token {span.stop - 1}"
            pending_row[len(input_ids)] = sequence.pending_row
            input_ids.append(0)
        positions += span
        rope_sets += [sequence.rope_set] * len(span)
    tokens = to_device(input_ids, torch.int64, device)
    if pending_row:
        assert last_token_ids is not None, f"no step sampled the tokens of {len(pending_row)} sequences"
        rows = to_device(list(pending_row.values()), torch.int64, device)
        # A token that could not be sampled (-1) ends its sequence when it is read; until then any valid id will do.
        tokens[to_device(list(pending_row), torch.int64, device)] = last_token_ids[rows].clamp(min=0)
    attention = backend.build_attention_metadata(
        [item.num_tokens for item in scheduled],
        [item.seq.num_computed_tokens + item.num_tokens for item in scheduled],
        [item.seq.block_table for item in scheduled],
        block_size,
    )
    return ModelInputs(
        tokens, to_device(positions, torch.int64, device), to_device(rope_sets, torch.int64, device), attention
    )
