"""Tests that compiled code writes of a step what its plan says, whatever was in the memory before."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.backends.inputs import NOT_PENDING, StepPlan

BLOCK_SIZE = 4


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    seqs, tables = [], []
    for _ in range(draw(st.integers(0, 5))):
        computed, query_len, spare = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(0, 2))
        num_blocks = -(-(computed + query_len) // BLOCK_SIZE) + spare
        row = draw(st.integers(NOT_PENDING, 3))
        seqs.append((query_len, computed + query_len, draw(st.integers(0, 1)), num_blocks, row))
        tables += [draw(st.integers(0, 2**31 // BLOCK_SIZE)) for _ in range(num_blocks)]
    num_tokens = sum(seq[0] for seq in seqs)
    return StepPlan(np.arange(1, num_tokens + 1), np.array(seqs, np.int64).reshape(-1, 5), np.array(tables, np.int32))


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 3), st.integers(0, 2))
def test_the_memory_has_what_the_plan_says(plan: StepPlan, more_tokens: int, wider: int) -> None:
    width = max([1, *plan.num_blocks.tolist()]) + wider
    shape = StepShape(plan.num_tokens + more_tokens, plan.num_seqs + more_tokens, width)
    last = torch.tensor([70, -1, 72, 73])
    buffer = StepBuffer(shape, torch.full((shape.num_bytes,), 85, dtype=torch.uint8))
    buffer.load(plan, BLOCK_SIZE, last)
    inputs, n = buffer.inputs, plan.num_tokens
    tokens, rows = plan.pending()
    input_ids = plan.input_ids.copy()
    input_ids[tokens] = last.clamp(min=0)[torch.from_numpy(rows)].numpy()
    padding = [0] * more_tokens
    assert inputs.input_ids.tolist() == input_ids.tolist() + padding
    assert inputs.positions.tolist() == plan.positions.tolist() + padding
    assert inputs.rope_sets.tolist() == plan.of_tokens(plan.rope_sets).tolist() + padding
    attention = inputs.attention
    assert attention.slots.tolist() == plan.slots(BLOCK_SIZE).tolist() + [-1] * more_tokens
    assert attention.query_starts.tolist() == [0, *plan.query_ends.tolist()] + [n] * more_tokens
    assert attention.context_lens.tolist() == plan.context_lens.tolist() + padding
    for i, table in enumerate(plan.as_lists()[2] if plan.num_seqs else []):
        assert attention.block_tables[i, : len(table)].tolist() == table.tolist()
    assert inputs.num_tokens is not None and inputs.num_tokens.item() == n
