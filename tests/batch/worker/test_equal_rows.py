"""EqualRows: which rows are equal, who waits for whom, and how long answers are kept."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.batch.worker.equal_rows import ANSWER_TOKENS, Answer, EqualRows, Turn
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request, TokenLogprobs

GREEDY = SamplingParams(max_tokens=4)
SHARD = InFlightShard(0, [])


def row(
    index: int,
    prompt: Sequence[int] = (1, 2, 3),
    params: SamplingParams = GREEDY,
    continuations: Any = (),
    key: int = 0,
) -> InFlightRow:
    return InFlightRow(index, Request("", prompt, params, key, continuations))


def answer(*token_ids: int, **fields: Any) -> Answer:
    return Answer([Completion(token_ids, "length", 3, **fields)], 0.5)


def are_equal(first: InFlightRow, second: InFlightRow) -> bool:
    rows = EqualRows()
    assert rows.add(SHARD, first) is Turn.THIS
    return rows.add(SHARD, second) is Turn.OTHER


def test_rows_without_chance_are_equal_whatever_their_seed() -> None:
    assert are_equal(row(0, key=1), row(1, key=2))
    assert are_equal(row(0), row(1, params=SamplingParams(max_tokens=4, seed=5)))
    sampled = SamplingParams(max_tokens=1, temperature=1.0)
    assert are_equal(row(0, params=sampled, continuations=[[4], [5]]), row(1, params=sampled, continuations=[[4], [5]]))


@pytest.mark.parametrize(
    "other",
    [
        row(1, (1, 2)),
        row(1, (1, 2, 3, 3)),
        row(1, params=SamplingParams(max_tokens=5)),
        row(1, params=SamplingParams(max_tokens=4, n=2)),
        row(1, params=SamplingParams(max_tokens=4, logit_bias={7: 1.0})),
        row(1, params=SamplingParams(max_tokens=4, logprobs=0)),
        row(1, (1,), continuations=[[2, 3]]),
    ],
)
def test_rows_that_differ_are_not_equal(other: InFlightRow) -> None:
    assert not are_equal(row(0), other)


def test_a_continuation_is_not_a_part_of_the_prompt_and_two_are_not_one() -> None:
    assert not are_equal(row(0, (1, 2), continuations=[[3, 4]]), row(1, (1, 2, 3), continuations=[[4]]))
    assert not are_equal(row(0, (1,), continuations=[[3, 4]]), row(1, (1,), continuations=[[3], [4]]))


def test_sampled_rows_are_never_equal() -> None:
    sampled = SamplingParams(max_tokens=4, temperature=0.1)
    assert not are_equal(row(0, params=sampled), row(1, params=sampled))


def test_the_answer_of_the_first_is_for_all_that_wait_and_for_those_to_come() -> None:
    rows, other = EqualRows(), InFlightShard(1, [])
    turns = [rows.add(SHARD, row(0)), rows.add(SHARD, row(1)), rows.add(other, row(0))]
    assert turns == [Turn.THIS, Turn.OTHER, Turn.OTHER]
    waited = rows.finish(SHARD, row(0), answer(8, 9))
    assert [(shard.index, one.index) for shard, one in waited] == [(0, 1), (1, 0)]
    assert rows.add(other, row(5)) == answer(8, 9)
    assert rows.finish(SHARD, row(1), answer(8, 9)) == [], "a copy is nobody's first row"


def test_an_error_is_not_kept_and_the_next_row_is_the_first() -> None:
    rows = EqualRows()
    rows.add(SHARD, row(0)), rows.add(SHARD, row(1))
    failed = Answer([Completion((), "error", 3, error=("row_timeout", "not done"))], 9.0)
    assert [one.index for _, one in rows.finish(SHARD, row(0), failed)] == [1]
    assert rows.add(SHARD, row(1)) is Turn.THIS


def test_answers_used_longest_ago_are_dropped_first() -> None:
    rows = EqualRows(max_kept_tokens=2 * (ANSWER_TOKENS + 2))
    for number in (1, 2):
        rows.add(SHARD, row(number, [number]))
        rows.finish(SHARD, row(number, [number]), answer(8, 9))
    assert rows.add(SHARD, row(0, [1])) == answer(8, 9)
    rows.add(SHARD, row(3, [3]))
    rows.finish(SHARD, row(3, [3]), answer(8, 9))
    again = [rows.add(SHARD, row(0, [number])) for number in (1, 2, 3)]
    assert again == [answer(8, 9), Turn.THIS, answer(8, 9)]


def test_logprobs_count_as_what_they_take() -> None:
    entry = TokenLogprobs(1, -0.5, ((1, -0.5), (2, -3.0)))
    assert answer(8, 9, logprobs=(entry, entry)).size > answer(8, 9, prompt_logprobs=(None, entry)).size
    assert answer(8, 9, prompt_logprobs=(None, entry)).size > answer(8, 9).size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.booleans()), max_size=40), st.integers(0, 60))
def test_every_row_gets_the_answer_of_its_prompt_once(steps: list[tuple[bool, int, bool]], kept: int) -> None:
    """Each step adds a row with one of four prompts, or finishes the oldest row that is computed, perhaps badly."""
    rows, computed, done = EqualRows(kept), list[tuple[int, int]](), dict[int, int]()

    def add(index: int, prompt: int) -> None:
        found = rows.add(SHARD, row(index, [prompt]))
        if isinstance(found, Answer):
            assert index not in done
            done[index] = found.completions[0].token_ids[0]
        elif found is Turn.THIS:
            computed.append((index, prompt))

    def finish(*, well: bool) -> None:
        index, prompt = computed.pop(0)
        assert index not in done
        done[index] = prompt
        result = answer(prompt) if well else answer(prompt, error=("row_timeout", ""))
        for _, other in rows.finish(SHARD, row(index, [prompt]), result):
            if well:
                assert other.index not in done
                done[other.index] = prompt
            else:
                add(other.index, prompt)

    prompts: list[int] = []
    for adds, prompt, well in steps:
        if adds:
            prompts.append(prompt)
            add(len(prompts) - 1, prompt)
        elif computed:
            finish(well=well)
    while computed:
        assert len({prompt for _, prompt in computed}) == len(computed), "two equal rows are computed at once"
        finish(well=True)
    assert done == dict(enumerate(prompts))
