"""Plan a step from a schedule: numbers in arrays, from which each rank builds its inputs."""

from collections.abc import Sequence

import numpy as np

from moray.engine.backends.inputs import StepPlan, integers
from moray.engine.core.scheduler import Scheduled


def plan_step(scheduled: Sequence[Scheduled]) -> StepPlan:
    """Plan a step of the scheduled tokens."""
    seqs = [seq for seq, _ in scheduled]
    query_lens = integers([num_tokens for _, num_tokens in scheduled])
    context_lens = query_lens + integers([seq.num_computed_tokens for seq in seqs])
    query_ends = query_lens.cumsum()
    # The newest token of a sequence may be on the device; it is the last one of its sequence in the step then.
    is_pending = context_lens > integers([len(seq.token_ids) for seq in seqs])
    rows = [seqs[i].pending_row for i in is_pending.nonzero()[0].tolist()]
    pending_rows = [row for row in rows if row is not None]
    assert len(rows) == len(pending_rows), "tokens are scheduled that neither the host has nor the last step sampled"
    input_ids = np.zeros(query_ends[-1], np.int64)
    for i in ((query_lens > 1) | ~is_pending).nonzero()[0].tolist():
        seq, num_tokens = scheduled[i]
        token_ids = seq.token_ids[seq.num_computed_tokens : seq.num_computed_tokens + num_tokens]
        first = query_ends[i] - num_tokens
        input_ids[first : first + len(token_ids)] = token_ids
    return StepPlan(
        input_ids=input_ids,
        query_lens=query_lens,
        context_lens=context_lens,
        rope_sets=integers([seq.rope_set for seq in seqs]),
        blocks=np.frombuffer(bytearray().join([seq.block_table for seq in seqs]), np.int32),
        num_blocks=integers([len(seq.block_table) for seq in seqs]),
        pending_tokens=query_ends[is_pending] - 1,
        pending_rows=integers(pending_rows),
    )


def plan_prompt(token_ids: list[int], block_table: list[int], rope_set: int) -> StepPlan:
    """Plan a step with one prompt, all of whose tokens the host has."""
    length = integers([len(token_ids)])
    return StepPlan(
        input_ids=integers(token_ids),
        query_lens=length,
        context_lens=length,
        rope_sets=integers([rope_set]),
        blocks=np.array(block_table, np.int32),
        num_blocks=integers([len(block_table)]),
        pending_tokens=integers([]),
        pending_rows=integers([]),
    )


def one_prompt(num_tokens: int, block_size: int) -> StepPlan:
    """Plan a step with one prompt of `num_tokens` tokens, whose block table repeats the cache's first block."""
    return plan_prompt([0] * num_tokens, [0] * -(-num_tokens // block_size), 0)
