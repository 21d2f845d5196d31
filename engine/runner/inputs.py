"""Plan a step from a schedule: numbers in arrays, from which each rank builds its inputs."""

from collections.abc import Sequence

import numpy as np

from moray.engine.backends.inputs import StepPlan
from moray.engine.core.scheduler import Scheduled


def plan_step(scheduled: Sequence[Scheduled]) -> StepPlan:
    """Plan a step of the scheduled tokens."""
    seqs = [item.seq for item in scheduled]
    input_ids: list[int] = []
    pending_tokens: list[int] = []
    pending_rows: list[int] = []
    for seq, num_tokens in scheduled:
        token_ids, start = seq.token_ids, seq.num_computed_tokens
        if start + num_tokens <= len(token_ids):
            if num_tokens == 1:
                input_ids.append(token_ids[start])
            else:
                input_ids += token_ids[start : start + num_tokens]
        else:  # the newest token is on the device
            assert seq.pending_row is not None, f"sequence {seq.seq_id} has no token {start + num_tokens - 1}"
            input_ids += token_ids[start:]
            pending_tokens.append(len(input_ids))
            pending_rows.append(seq.pending_row)
            input_ids.append(0)
    query_lens = np.array([item.num_tokens for item in scheduled])
    return StepPlan(
        input_ids=np.array(input_ids),
        query_lens=query_lens,
        context_lens=query_lens + [seq.num_computed_tokens for seq in seqs],
        rope_sets=np.array([seq.rope_set for seq in seqs]),
        blocks=np.frombuffer(bytearray().join([seq.block_table for seq in seqs]), np.int32),
        num_blocks=np.array([len(seq.block_table) for seq in seqs]),
        pending_tokens=np.array(pending_tokens, np.int64),
        pending_rows=np.array(pending_rows, np.int64),
    )


def one_prompt(num_tokens: int, block_size: int) -> StepPlan:
    """Plan a step with one prompt of `num_tokens` tokens, whose block table repeats the cache's first block."""
    num_blocks = -(-num_tokens // block_size)
    none = np.zeros(0, np.int64)
    return StepPlan(
        input_ids=np.zeros(num_tokens, np.int64),
        query_lens=np.array([num_tokens]),
        context_lens=np.array([num_tokens]),
        rope_sets=np.zeros(1, np.int64),
        blocks=np.zeros(num_blocks, np.int32),
        num_blocks=np.array([num_blocks]),
        pending_tokens=none,
        pending_rows=none,
    )
