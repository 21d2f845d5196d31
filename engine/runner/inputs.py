"""Plan a step from a schedule, as plain numbers, and build its inputs, as tensors."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moray.engine.backends.base import Backend
from moray.engine.backends.inputs import ModelInputs
from moray.engine.core.scheduler import Scheduled
from moray.engine.platform.transfer import to_device


@dataclass(frozen=True)
class StepPlan:
    """A step: the scheduled tokens of each sequence, with their positions and rope sets. All ranks run it.

    input_ids, positions, rope_sets:  of each token
    query_lens, context_lens, block_tables:  of each sequence, see Backend.build_attention_metadata
    pending_rows:  token of this step -> row of the tokens that the last step sampled, which are not read yet
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rope_sets: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    block_tables: "list[array[int]]" = field(default_factory=list)
    pending_rows: dict[int, int] = field(default_factory=dict)


def plan_step(scheduled: Sequence[Scheduled]) -> StepPlan:
    """Plan a step of the scheduled tokens."""
    plan = StepPlan()
    for item in scheduled:
        sequence, start = item.seq, item.seq.num_computed_tokens
        span = range(start, start + item.num_tokens)
        input_ids = sequence.token_ids[span.start : span.stop]
        if len(input_ids) == item.num_tokens - 1:
            assert sequence.pending_row is not None, f"sequence {sequence.seq_id} has no token {span.stop - 1}"
            plan.pending_rows[len(plan.input_ids) + len(input_ids)] = sequence.pending_row
            input_ids = [*input_ids, 0]
        plan.input_ids.extend(input_ids)
        plan.positions.extend(span)
        plan.rope_sets.extend([sequence.rope_set] * len(span))
        plan.query_lens.append(item.num_tokens)
        plan.context_lens.append(span.stop)
        plan.block_tables.append(sequence.block_table)
    return plan


def build_inputs(
    plan: StepPlan, block_size: int, backend: Backend, last_token_ids: Tensor | None = None
) -> ModelInputs:
    """Build the inputs of a step.

    last_token_ids: the tokens that the last step sampled, on the device, for sequences whose newest token is unread;
                    None = only rank 0 has them
    """
    device = backend.torch_device
    tokens = to_device(plan.input_ids, torch.int64, device)
    if plan.pending_rows and last_token_ids is not None:
        rows = to_device(list(plan.pending_rows.values()), torch.int64, device)
        # A token that could not be sampled (-1) ends its sequence when it is read; until then any valid id will do.
        tokens[to_device(list(plan.pending_rows), torch.int64, device)] = last_token_ids[rows].clamp(min=0)
    attention = backend.build_attention_metadata(plan.query_lens, plan.context_lens, plan.block_tables, block_size)
    positions, rope_sets = (to_device(of, torch.int64, device) for of in (plan.positions, plan.rope_sets))
    return ModelInputs(tokens, positions, rope_sets, attention)
