"""Which of the waiting rows goes next: nothing lost, what is cached first, nobody kept waiting for ever."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.stages.shard_run import Row, ShardRun
from batch.stages.waiting import FAIR_EVERY, Waiter, Waiting, none_cached
from engine.params import SamplingParams

RUN = ShardRun(0, [])


def waiter(index: int, num_cached: Callable[[], int] = none_cached, n: int = 1) -> Waiter:
    return Waiter(RUN, Row(index, [5], SamplingParams(n=n), 0), num_cached)


def filled(*cached: int, reach: int = 16) -> Waiting:
    waiting = Waiting(reach)
    for index, tokens in enumerate(cached):
        waiting.add(waiter(index, lambda tokens=tokens: tokens))  # type: ignore[misc]
    return waiting


def indices(waiters: list[Waiter]) -> list[int]:
    return [waiter.row.index for waiter in waiters]


@pytest.mark.parametrize(
    ("cached", "seats", "order"),
    [
        ([0, 0, 0, 0], 3, [0, 1, 2]),
        ([0, 16, 48, 16], 4, [0, 2, 1, 3]),  # the oldest has its turn first
        ([32, 32, 0, 32], 2, [0, 1]),
        ([0, 0, 0], 9, [0, 1, 2]),
        ([16, 0], 0, []),
        ([16, 0], -1, []),
        ([], 3, []),
    ],
)
def test_what_is_cached_goes_before_it_is_gone_and_the_rest_by_age(
    cached: list[int], seats: int, order: list[int]
) -> None:
    waiting = filled(*cached)
    assert indices(waiting.take(seats)) == order
    assert len(waiting) == len(cached) - len(order)


def test_the_cache_is_asked_as_it_is_now() -> None:
    waiting, cached = Waiting(16), {2: 16, 3: 0}
    for index in range(4):
        waiting.add(waiter(index, lambda index=index: cached.get(index, 0)))  # type: ignore[misc]
    assert indices(waiting.take(2)) == [0, 2]
    cached[3] = 16
    assert indices(waiting.take(1)) == [3]


def test_seats_are_for_samples() -> None:
    waiting = Waiting(16)
    for index in range(4):
        waiting.add(waiter(index, n=3))
    assert indices(waiting.take(4)) == [0, 1], "a row whose samples have not all a seat is not left out"
    assert indices(waiting.take(3)) == [2]


def test_only_the_oldest_are_looked_at() -> None:
    assert indices(filled(0, 0, 16, 32, reach=3).take(4)) == [0, 2, 1, 3]


def test_the_cache_is_not_asked_for_every_row() -> None:
    asked: list[int] = []
    waiting = Waiting(32)
    for index in range(32):
        waiting.add(waiter(index, lambda index=index: asked.append(index) or 0))  # type: ignore[misc,func-returns-value]
    taken = [indices(waiting.take(1)) for _ in range(32)]
    assert taken == [[index] for index in range(32)]
    assert len(asked) == sum(range(2, 33, 2)), "every second time, those that are left"


def test_nobody_waits_for_ever() -> None:
    """Though rows that are cached keep coming."""
    waiting = filled(*[0] * 5)
    taken: list[int] = []
    for step in range(5 * FAIR_EVERY):
        waiting.add(waiter(100 + step, lambda: 16))
        taken += indices(waiting.take(1))
    assert [index for index in taken if index < 100] == [0, 1, 2, 3, 4]


@given(st.lists(st.one_of(st.integers(0, 3).map(lambda blocks: 16 * blocks), st.just("take")), max_size=60))
def test_every_row_once(events: list[int | str]) -> None:
    waiting, added, taken = Waiting(4), 0, list[int]()
    for event in events:
        if isinstance(event, int):
            waiting.add(waiter(added, lambda tokens=event: tokens))  # type: ignore[misc]
            added += 1
        else:
            taken += indices(waiting.take(2))
    taken += indices(waiting.take(len(waiting)))
    assert sorted(taken) == list(range(added)) and len(waiting) == 0
