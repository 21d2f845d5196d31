"""The order of the waiting rows: no row is lost, cached prompts go first, and no row waits forever."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.batch.worker.admission_queue import OLDEST_EVERY, AdmissionQueue, QueuedRow, none_cached
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.engine.params import SamplingParams
from moray.engine.request import Request

RUN = InFlightShard(0, [])


def queued(index: int, num_cached: Callable[[], int] = none_cached, n: int = 1) -> QueuedRow:
    return QueuedRow(RUN, InFlightRow(index, Request("", [5], SamplingParams(n=n))), num_cached)


def filled(*cached: int, window: int = 16) -> AdmissionQueue:
    waiting = AdmissionQueue(window)
    for index, tokens in enumerate(cached):
        waiting.add(queued(index, lambda tokens=tokens: tokens))  # type: ignore[misc]
    return waiting


def indices(queued_rows: list[QueuedRow]) -> list[int]:
    return [queued.row.index for queued in queued_rows]


@pytest.mark.parametrize(
    ("cached", "num_seqs", "order"),
    [
        ([0, 0, 0, 0], 3, [0, 1, 2]),
        ([0, 16, 48, 16], 4, [0, 2, 1, 3]),  # the oldest row is first
        ([32, 32, 0, 32], 2, [0, 1]),
        ([0, 0, 0], 9, [0, 1, 2]),
        ([16, 0], 0, []),
        ([16, 0], -1, []),
        ([], 3, []),
    ],
)
def test_what_is_cached_goes_before_it_is_gone_and_the_rest_by_age(
    cached: list[int], num_seqs: int, order: list[int]
) -> None:
    waiting = filled(*cached)
    assert indices(waiting.pop(num_seqs)) == order
    assert len(waiting) == len(cached) - len(order)


def test_the_cache_is_asked_as_it_is_now() -> None:
    waiting, cached = AdmissionQueue(16), {2: 16, 3: 0}
    for index in range(4):
        waiting.add(queued(index, lambda index=index: cached.get(index, 0)))  # type: ignore[misc]
    assert indices(waiting.pop(2)) == [0, 2]
    cached[3] = 16
    assert indices(waiting.pop(1)) == [3]


def test_rows_are_popped_by_their_samples() -> None:
    waiting = AdmissionQueue(16)
    for index in range(4):
        waiting.add(queued(index, n=3))
    assert indices(waiting.pop(4)) == [0, 1], "a row is not left out because not all its samples fit"
    assert indices(waiting.pop(3)) == [2]


def test_only_the_oldest_are_looked_at() -> None:
    assert indices(filled(0, 0, 16, 32, window=3).pop(4)) == [0, 2, 1, 3]


def test_the_cache_is_not_asked_for_every_row() -> None:
    asked: list[int] = []
    waiting = AdmissionQueue(32)
    for index in range(32):
        waiting.add(queued(index, lambda index=index: asked.append(index) or 0))  # type: ignore[misc,func-returns-value]
    popped = [indices(waiting.pop(1)) for _ in range(32)]
    assert popped == [[index] for index in range(32)]
    assert len(asked) == sum(range(2, 33, 2)), "every second time, those that are left"


def test_no_row_waits_forever() -> None:
    """Rows whose prompts are cached keep arriving."""
    waiting = filled(*[0] * 5)
    popped: list[int] = []
    for step in range(5 * OLDEST_EVERY):
        waiting.add(queued(100 + step, lambda: 16))
        popped += indices(waiting.pop(1))
    assert [index for index in popped if index < 100] == [0, 1, 2, 3, 4]


@given(st.lists(st.one_of(st.integers(0, 3).map(lambda blocks: 16 * blocks), st.just("pop")), max_size=60))
def test_every_row_once(events: list[int | str]) -> None:
    waiting, added, popped = AdmissionQueue(4), 0, list[int]()
    for event in events:
        if isinstance(event, int):
            waiting.add(queued(added, lambda tokens=event: tokens))  # type: ignore[misc]
            added += 1
        else:
            popped += indices(waiting.pop(2))
    popped += indices(waiting.pop(len(waiting)))
    assert sorted(popped) == list(range(added)) and len(waiting) == 0
