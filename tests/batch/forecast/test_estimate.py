"""Totals estimated from random runs, compared with known totals."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.batch.forecast.estimate import EstimatedRange, estimate_total
from moray.batch.student_t import student_t


def test_all_rows_are_counted_not_estimated() -> None:
    assert estimate_total([(3, 30), (2, 5)], 5) == EstimatedRange(35, 35, 35)
    assert estimate_total([], 0) == EstimatedRange(0, 0, 0)


def test_two_runs_by_hand() -> None:
    # mean 3; squares (4 - 6)^2 + (8 - 6)^2 = 8 over 1; error sqrt((1 - 4/40) * 8 / 2) / 2 = 0.9487 a row
    found = estimate_total([(2, 4), (2, 8)], 40)
    assert found.expected == 120
    half = student_t(1, 0.95) * 0.9486833 * 40
    assert found.high == pytest.approx(120 + half, abs=1) and found.low == 12  # what was seen is there


def test_a_run_alone_tells_nothing_of_the_others() -> None:
    with pytest.raises(ValueError, match="1 runs with 10 rows are too few to estimate 20 rows"):
        estimate_total([(10, 5)], 20)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 1000)), min_size=2, max_size=30), st.integers(0, 10**6))
def test_a_range_holds_its_middle_and_what_was_seen(runs: list[tuple[int, int]], others: int) -> None:
    found = estimate_total(runs, sum(rows for rows, _ in runs) + others)
    assert found.expected is not None
    assert sum(amount for _, amount in runs) <= found.low <= found.expected <= found.high


def _uniform(random_: random.Random, run: int) -> int:
    return random_.randint(1, 200)


def _sorted(random_: random.Random, run: int) -> int:
    return run // 4


def _alike_in_a_run(random_: random.Random, run: int) -> int:
    return 20 if run % 3 else 300


def _skewed(random_: random.Random, run: int) -> int:
    return int(random_.lognormvariate(4, 0.8))


@pytest.mark.parametrize("length", [_uniform, _sorted, _alike_in_a_run, _skewed])
def test_the_truth_lies_in_the_range_as_often_as_is_said(length: object) -> None:
    """95% of 500 draws are 475; fewer than 460 come of an honest range once in six hundred times."""
    assert callable(length)
    random_ = random.Random(5)
    whole = [[length(random_, run) for _ in range(10)] for run in range(1000)]
    truth = sum(map(sum, whole))
    hits = 0
    for _ in range(500):
        found = estimate_total([(10, sum(run)) for run in random_.sample(whole, 100)], 10_000)
        hits += found.low <= truth <= found.high
    assert 460 <= hits <= 495, hits
