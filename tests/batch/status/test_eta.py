"""The speed of a job and its end, with a clock of the test's own and on simulated runs whose end is known."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import pytest

from moray.batch.status.eta import EtaEstimator, ThroughputMeter, TimeLeft


def test_speed_is_that_of_the_last_half_minute() -> None:
    meter = ThroughputMeter()
    for second in range(101):
        tokens = second if second <= 50 else 50 + 3 * (second - 50)
        meter.mark(second, prompt_tokens=tokens, generated_tokens=10 * second)
    assert meter.rates() == (3.0, 10.0)


def test_speed_starts_anew_when_work_was_lost() -> None:
    meter = ThroughputMeter()
    for second, tokens in enumerate([0, 100, 200, 50, 60, 70]):
        meter.mark(second, prompt_tokens=0, generated_tokens=tokens)
    assert meter.rates() == (0.0, 10.0)


def test_no_time_has_no_speed() -> None:
    meter = ThroughputMeter()
    assert meter.rates() == (0.0, 0.0)
    meter.mark(1.0, 5, 5)
    assert meter.rates() == (0.0, 0.0)


def test_time_left_is_not_known_before_rows_are_done_or_without_workers() -> None:
    estimator = EtaEstimator()
    assert estimator.time_left(100, 0) is None
    for second in range(21):
        estimator.mark(second, rows=0, workers=0 if second < 10 else 2, rows_in_engines=8)
        assert estimator.time_left(100, 8) is None
    estimator.mark(30, rows=20, workers=2, rows_in_engines=8)
    assert estimator.time_left(80, 8) == TimeLeft(80.0)  # 20 rows in 40 s of a worker, and two workers
    estimator.mark(40, rows=40, workers=2, rows_in_engines=8)
    assert estimator.time_left(60, 8) == TimeLeft(30.0)  # the first rows took longer: the engines were filled
    estimator.mark(41, rows=42, workers=0, rows_in_engines=0)
    assert estimator.time_left(58, 0) is None


def test_more_workers_are_less_time_at_once() -> None:
    estimator = EtaEstimator()
    for second in range(101):
        estimator.mark(second, rows=second, workers=1, rows_in_engines=0)
    before = estimator.time_left(200, 0)
    assert before is not None and before.seconds == pytest.approx(200)
    estimator.mark(101, rows=101, workers=4, rows_in_engines=0)
    after = estimator.time_left(200, 0)
    assert after is not None and after.seconds == pytest.approx(50)


def test_a_job_that_stands_still_takes_ever_longer() -> None:
    estimator = EtaEstimator()
    for second in range(201):
        estimator.mark(second, rows=min(second, 100), workers=1, rows_in_engines=8)
    left = estimator.time_left(100, 8)
    assert left is not None and left.seconds > 200 and left.high_s is not None


def test_rows_that_end_together_and_a_few_in_between() -> None:
    """64 rows end every 8 s, and a bad row every 3 s."""
    estimator, known = EtaEstimator(), []
    for tick in range(161):
        rows = tick // 16 * 64 + tick // 6
        estimator.mark(tick / 2, rows, workers=1, rows_in_engines=64)
        known.append(estimator.time_left(1000, 64))
    assert known[31] is not None and known[31].seconds == pytest.approx(1000 / (64 / 8 + 1 / 3), rel=0.05)
    left = known[-1]
    assert left is not None and left.low_s is not None and left.high_s is not None
    assert left.seconds == pytest.approx(120, rel=0.05) and left.high_s - left.low_s < 0.5 * left.seconds


@dataclass(frozen=True)
class Moment:
    time_s: float
    rows: int
    workers: int
    seqs: int


def made_run(
    seed: int,
    *,
    rows: int = 600,
    spread: float = 0.6,
    last: float = 1.0,
    wobble: float = 0.0,
    workers: Callable[[float], int] = lambda time_s: 1,
) -> list[Moment]:
    """Simulate a job whose workers run 16 rows at once; return its state every half second until it is over.

    spread:  sigma of the logarithms of the rows' costs, which are about 8 s and 32 s at most
    last:    cost of the last rows, relative to the first ones
    wobble:  how much the speed changes every half second
    """
    chance = random.Random(seed)
    costs = [min(4.0, chance.lognormvariate(0, spread)) * 8 * (1 + (last - 1) * i / rows) for i in range(rows)]
    waiting, running, time_s, done, speed = list(reversed(costs)), list[float](), 0.0, 0, 1.0
    moments = []
    while done < rows:
        capacity = 16 * workers(time_s)
        time_s += 0.5
        speed = 1 + 0.97 * (speed - 1) + chance.gauss(0, wobble)
        running = [left - 0.5 * max(0.1, speed) for left in running[:capacity]] + running[capacity:]
        done += sum(left <= 0 for left in running)
        running = [left for left in running if left > 0]
        while len(running) < capacity and waiting:
            running.append(waiting.pop())
        moments.append(Moment(time_s, done, capacity // 16, min(capacity, len(running))))
    return moments


def judge(run: list[Moment]) -> tuple[float, float, float]:
    """Return how good the ranges of a run are.

    The values are the share of moments with a range, the share of those at which the end was inside it, and the median
    width of the ranges relative to the time that was left.
    """
    estimator, end_s = EtaEstimator(), run[-1].time_s
    widths, hits = [], []
    for now in run[:-1]:
        estimator.mark(now.time_s, now.rows, now.workers, now.seqs)
        left = estimator.time_left(run[-1].rows - now.rows, now.seqs)
        if left is None or left.low_s is None or left.high_s is None:
            continue
        assert 0 <= left.low_s <= left.seconds <= left.high_s
        hits.append(left.low_s <= end_s - now.time_s <= left.high_s)
        widths.append((left.high_s - left.low_s) / (end_s - now.time_s))
    return len(hits) / len(run), mean(hits), median(widths)


@pytest.mark.parametrize(
    ("made", "hit", "width"),
    [
        ({}, 0.9, 0.8),
        ({"rows": 4000}, 0.9, 0.35),
        ({"spread": 1.0}, 0.9, 1.0),
        ({"spread": 0.0}, 0.85, 0.4),  # rows end in lumps
        ({"wobble": 0.05}, 0.85, 1.1),
        ({"last": 2.5}, 0.85, 3.0),
        ({"last": 0.4}, 0.6, 1.3),  # nobody can know
        ({"workers": lambda time_s: 3 if int(time_s / 50) % 2 == 0 else 2}, 0.75, 1.1),
    ],
    ids=["even", "long", "uneven", "alike", "wobbling", "dearer", "cheaper", "spot"],
)
def test_the_end_lies_in_the_range_most_of_the_time(made: dict[str, Any], hit: float, width: float) -> None:
    seen = [judge(made_run(seed, **made)) for seed in range(2 if "rows" in made else 8)]
    known, hits, widths = (mean(column) for column in zip(*seen, strict=True))
    assert known > 0.7
    assert hits >= hit and widths <= width, (hits, widths)
