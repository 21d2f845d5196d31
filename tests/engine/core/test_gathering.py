"""Tests of prompts that wait for each other: fewer steps contain prompts, and no seat is empty for long."""

import random
from dataclasses import dataclass

import pytest

from moray.engine.core.block_manager import BlockManager
from moray.engine.core.gathering import AT_ONCE, Gathering, choose_gathering
from moray.engine.core.scheduler import Scheduler
from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request


@dataclass
class Counts:
    steps: int = 0
    mixed: int = 0
    decodes: int = 0


def simulate(seats: int, gathering: Gathering, num_rows: int, *, seed: int = 0) -> Counts:
    """Run a batch job's rows through a scheduler without a model, as a worker does: it adds rows for the free seats.

    Prompts have 341 to 682 tokens and completions 170 to 340, uniformly. All but the job's tail is counted, in which
    seats are empty for want of rows.
    """
    numbers = random.Random(seed)
    scheduler = Scheduler(
        BlockManager(seats * 64, 16, enable_prefix_cache=False),
        max_num_seqs=seats,
        max_num_batched_tokens=2048,
        max_model_len=1024,
        original_max_position_embeddings=None,
        gathering=gathering,
    )
    added, counts = 0, Counts()
    while added < num_rows:
        while added < num_rows and len(scheduler.running) + len(scheduler.waiting) < seats:
            prompt = [added] * numbers.randint(341, 682)
            params = SamplingParams(max_tokens=numbers.randint(170, 340))
            scheduler.add(Sequence(added, Request(str(added), prompt, params)))
            added += 1
        scheduled = scheduler.schedule()
        counts.steps += 1
        counts.decodes += sum(item.num_tokens == 1 for item in scheduled)
        counts.mixed += any(item.num_tokens > 1 for item in scheduled)
        scheduler.advance(scheduled)
        for seq in [item.seq for item in scheduled if item.seq.num_uncomputed_tokens == 0]:
            seq.append(1)
            if seq.num_generated == seq.request.params.max_tokens:
                scheduler.finish(seq)
    return counts


@pytest.mark.parametrize(("seats", "most_mixed"), [(32, 0.08), (128, 0.2), (256, 0.4)])
def test_a_batch_job_has_fewer_steps_with_prompts_and_hardly_more_steps(seats: int, most_mixed: float) -> None:
    before = simulate(seats, AT_ONCE, 3 * seats)
    after = simulate(seats, choose_gathering(seats, 1 / 32, is_bulk=True), 3 * seats)
    assert after.mixed / after.steps <= most_mixed
    assert after.mixed <= 0.65 * before.mixed
    assert after.decodes / after.steps >= 0.98 * before.decodes / before.steps


class Decoding:
    """A scheduler of 8 seats and 64 tokens a step, of which 2 seats may be empty, with sequences that decode."""

    def __init__(self, num_running: int, **gathering: bool) -> None:
        self.scheduler = Scheduler(
            BlockManager(256, 4, enable_prefix_cache=False),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=1000,
            original_max_position_embeddings=None,
            gathering=Gathering(2, **gathering),
        )
        self.num_added = 0
        for _ in range(num_running):
            self.add(1)
        while self.scheduler.waiting:
            self.step()

    def add(self, num_tokens: int, priority: int = 0) -> None:
        request = Request(
            str(self.num_added), list(range(1, num_tokens + 1)), SamplingParams(max_tokens=400), priority=priority
        )
        self.scheduler.add(Sequence(self.num_added, request))
        self.num_added += 1

    def step(self) -> list[int]:
        """Run a step and return the tokens of its prompts."""
        scheduled = self.scheduler.schedule()
        prompts = [item.num_tokens for item in scheduled if item.num_tokens > 1]
        self.scheduler.advance(scheduled)
        for seq in [item.seq for item in scheduled if item.seq.num_uncomputed_tokens == 0]:
            seq.append(1)
        return prompts


def test_a_prompt_waits_until_the_prompts_fill_a_step() -> None:
    engine = Decoding(6, is_bulk=True)
    engine.add(20)
    assert engine.step() == [], "44 tokens of the step would be left"
    engine.add(37)
    assert engine.step() == [], "57 of 58"
    engine.scheduler.abort("7")
    engine.add(38)
    assert engine.step() == [20, 38]


def test_a_prompt_waits_for_no_more_than_the_seats() -> None:
    engine = Decoding(6, is_bulk=True)
    engine.add(5)
    assert [engine.step() for _ in range(3)] == [[], [], []]
    engine.scheduler.abort("0")
    assert engine.step() == [5], "three seats are empty, though no other prompt has come"


def test_a_prompt_that_would_be_cut_waits_for_the_next_group() -> None:
    engine = Decoding(6, is_bulk=True)
    engine.add(40)
    engine.add(30)
    assert engine.step() == [40], "the other one would leave 12 tokens to the next step"
    assert engine.step() == []
    engine.scheduler.abort("0")
    engine.scheduler.abort("1")
    assert engine.step() == [30], "three seats are empty"


def test_prompts_do_not_wait_in_an_idle_engine() -> None:
    engine = Decoding(0, is_bulk=True)
    engine.add(5)
    assert engine.step() == [5]


def test_prompts_do_not_wait_beside_a_prompt() -> None:
    engine = Decoding(6, is_bulk=True)
    engine.add(100)
    assert engine.step() == [58]
    engine.add(5)
    assert engine.step() == [42, 5]


def test_only_bulk_waits_where_somebody_waits_for_first_tokens() -> None:
    engine = Decoding(6)
    engine.add(5)
    assert engine.step() == [5]
    engine.add(5, priority=1)
    assert engine.step() == []
    engine.scheduler.abort("0")
    engine.add(6)
    assert engine.step() == [6], "an urgent prompt takes none of lower priority along"


def test_seats_that_may_be_empty() -> None:
    assert choose_gathering(256, 1 / 32, is_bulk=True) == Gathering(8, is_bulk=True)
    assert choose_gathering(31, 1 / 32, is_bulk=False) == AT_ONCE, "one empty seat of few would cost too much"
    assert choose_gathering(256, 0, is_bulk=True).seats == 0
