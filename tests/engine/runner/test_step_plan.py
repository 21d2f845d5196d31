"""Tests of the plan of a step: what each rank computes from it, and that it travels to other ranks as it is."""

import pickle
from array import array

import pytest
import torch

from moray.engine.backends.cpu.backend import CPU
from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.inputs import plan_step

BLOCK_SIZE = 4


def sequence(
    number: int, token_ids: list[int], blocks: list[int], num_computed: int, row: int | None = None
) -> Sequence:
    seq = Sequence(number, Request(str(number), token_ids, SamplingParams()))
    seq.block_table, seq.num_computed_tokens = array("i", blocks), num_computed
    if row is not None:
        seq.await_token(row)
    return seq


def mixed_step() -> list[Scheduled]:
    """Return a decode with a pending token, one without, a chunk, and a prompt up to a pending token."""
    step = [
        (sequence(0, [1, 2, 3, 4, 5], [7, 3], 5, row=2), 1),
        (sequence(1, [11, 12, 13], [5], 2), 1),
        (sequence(2, [21, 22, 23, 24, 25, 26, 27], [0, 9], 2), 4),
        (sequence(3, [31, 32, 33], [4], 0, row=0), 4),
    ]
    step[1][0].rope_set = 1
    return [Scheduled(*item) for item in step]


def test_the_numbers_of_each_token() -> None:
    plan = plan_step(mixed_step())
    assert plan.input_ids.tolist() == [0, 13, 23, 24, 25, 26, 31, 32, 33, 0]
    assert plan.positions.tolist() == [5, 2, 2, 3, 4, 5, 0, 1, 2, 3]
    assert plan.of_tokens(plan.rope_sets).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert plan.slots(BLOCK_SIZE).tolist() == [13, 22, 2, 3, 36, 37, 16, 17, 18, 19]
    assert [i.tolist() for i in plan.pending()] == [[0, 9], [2, 0]] and plan.num_pending == 2
    assert plan.as_lists() == ([1, 1, 4, 4], [6, 3, 6, 4], [array("i", b) for b in ([7, 3], [5], [0, 9], [4])])
    assert (plan.num_tokens, plan.num_seqs, plan.max_blocks, plan.is_decode) == (10, 4, 2, False)


def test_a_token_that_nobody_has_is_refused() -> None:
    with pytest.raises(AssertionError, match="tokens up to 3 of sequence 0 are scheduled, which has 2"):
        plan_step([Scheduled(sequence(0, [1, 2], [0], 2), 1)])


def test_a_chunk_before_the_pending_token_takes_tokens_that_are_known() -> None:
    """A preempted sequence is computed again while its newest token is on the device."""
    plan = plan_step([Scheduled(sequence(0, [1, 2, 3], [6], 1, row=0), 1)])
    assert plan.input_ids.tolist() == [2] and plan.num_pending == 0


def test_ranks_get_the_same_plan_in_few_bytes() -> None:
    """Send only what the rest follows from: each rank computes the rest."""
    step = [Scheduled(sequence(i, [1] * 500, list(range(32)), 500, row=i), 1) for i in range(256)]
    plan = plan_step(step)
    sent = pickle.dumps(plan)
    assert len(sent) < 256 * (32 * 4 + 7 * 8) + 2000
    got = pickle.loads(sent)
    assert got.positions.tolist() == plan.positions.tolist() == [500] * 256
    assert got.slots(16).tolist() == plan.slots(16).tolist()


@pytest.mark.parametrize("shape", [StepShape(10, 4, 2), StepShape(16, 7, 5)], ids=["exact", "padded"])
def test_one_copy_has_the_inputs_that_tensors_one_by_one_have(shape: StepShape) -> None:
    plan, last = plan_step(mixed_step()), torch.tensor([90, 91, -1])
    buffer = StepBuffer(shape, torch.full((shape.num_bytes,), 85, dtype=torch.uint8))
    for _ in range(2):  # also over another step
        buffer.load(plan, BLOCK_SIZE, last)
        inputs, plain = buffer.inputs, CPU.build_inputs(plan, BLOCK_SIZE, last)
        for name in ("input_ids", "positions", "rope_sets"):
            assert getattr(inputs, name)[:10].tolist() == getattr(plain, name).tolist(), name
            assert not getattr(inputs, name)[10:].any(), name
        assert inputs.input_ids[:10].tolist() == [0, 13, 23, 24, 25, 26, 31, 32, 33, 90], "-1 is no token"
        attention = inputs.attention
        assert attention.slots.tolist() == plain.attention.slots.tolist() + [-1] * (shape.num_tokens - 10)
        assert attention.query_starts.tolist() == [0, 1, 2, 6, 10] + [10] * (shape.num_seqs - 4)
        assert attention.context_lens.tolist() == [6, 3, 6, 4] + [0] * (shape.num_seqs - 4)
        tables = [attention.block_tables[i, : len(t)].tolist() for i, t in enumerate(plan.as_lists()[2])]
        assert tables == [[7, 3], [5], [0, 9], [4]]
        assert inputs.num_tokens is not None and inputs.num_tokens.item() == 10
        buffer.load(plan_step(mixed_step()[1:3]), BLOCK_SIZE, last)
        assert buffer.inputs.attention.slots[5:].tolist() == [-1] * (shape.num_tokens - 5)


def test_every_part_of_the_memory_begins_where_16_divides() -> None:
    """Triton compiles a kernel again for a pointer that 16 does not divide."""
    for num_tokens, num_seqs in ((1, 1), (3, 2), (10, 7)):
        shape = StepShape(num_tokens, num_seqs, 3)
        inputs = StepBuffer(shape, torch.zeros(shape.num_bytes, dtype=torch.uint8)).inputs
        tensors = [
            inputs.input_ids,
            inputs.positions,
            inputs.rope_sets,
            inputs.num_tokens,
            *vars(inputs.attention).values(),
        ]
        assert all(
            tensor is not None and tensor.data_ptr() % 16 == inputs.input_ids.data_ptr() % 16 for tensor in tensors
        )
