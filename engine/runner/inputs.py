"""Plan a step from a schedule: numbers in arrays, from which each rank builds its inputs."""

from collections.abc import Sequence

import numpy as np

from moray.engine.backends.inputs import COLUMNS, NOT_PENDING, StepPlan, integers
from moray.engine.core.scheduler import Scheduled


def plan_step(scheduled: Sequence[Scheduled]) -> StepPlan:
    """Plan a step of the scheduled tokens."""
    input_ids: list[int] = []
    numbers: list[int] = []
    tables = []
    for seq, num_tokens in scheduled:
        start = seq.num_computed_tokens
        end = start + num_tokens
        row = seq.pending_row
        assert end <= seq.num_tokens, (
            f"tokens up to {end} of sequence {seq.seq_id} are scheduled, which has {seq.num_tokens}"
        )
        if row is None or end < seq.num_tokens:
            input_ids += seq.token_ids[start:end]
            row = NOT_PENDING
        else:  # the newest token is on the device, and the last one of its sequence here
            if num_tokens > 1:
                input_ids += seq.token_ids[start:]
            input_ids.append(0)
        table = seq.block_table
        numbers += num_tokens, end, seq.rope_set, len(table), row
        tables.append(table)
    blocks = np.frombuffer(bytearray().join(tables), np.int32)
    return StepPlan(integers(input_ids), integers(numbers).reshape(-1, len(COLUMNS)), blocks)


def plan_prompt(token_ids: list[int], block_table: list[int], rope_set: int) -> StepPlan:
    """Plan a step with one prompt, all of whose tokens the host has."""
    length = len(token_ids)
    numbers = length, length, rope_set, len(block_table), NOT_PENDING
    return StepPlan(integers(token_ids), np.array([numbers], np.int64), np.array(block_table, np.int32))


def one_prompt(num_tokens: int, block_size: int) -> StepPlan:
    """Plan a step with one prompt of `num_tokens` tokens, whose block table repeats the cache's first block."""
    return plan_prompt([0] * num_tokens, [0] * -(-num_tokens // block_size), 0)
