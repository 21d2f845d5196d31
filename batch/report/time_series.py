"""Compute time series of a run: speed and load by intervals of time, from its statistics or, with few, its commits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np

from moray.batch.report.events import RunEvents
from moray.batch.run_events import StatsSample

MIN_STATS = 5  # samples after the first worker was ready; with fewer the speed comes from the commits
MAX_INTERVALS = 120  # intervals of a run in a chart, at most


@dataclass(frozen=True)
class Interval:
    """Holds the speed in an interval of time.

    rows_done: finished rows of the whole job at the end of the interval
    """

    start: datetime
    end: datetime
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    rows_done: float


@dataclass(frozen=True)
class IntervalLoad:
    """Holds the load in an interval of time.

    seqs, waiting_seqs:  sequences in all engines, on average over the interval
    busy, kv_use:        shares from 0 to 1, on average over workers and interval
    """

    start: datetime
    end: datetime
    seqs: float
    waiting_seqs: float
    busy: float
    kv_use: float


def speeds(
    run: RunEvents, shard_tokens: Mapping[int, tuple[int, int]], shard_rows: Mapping[int, int]
) -> list[Interval]:
    """Return a run's speed by intervals; empty for a retry, whose parts hold rows that it did not generate.

    shard_tokens:  prompt and generated tokens of each committed shard
    shard_rows:    rows of each committed shard
    """
    if run.is_retry:
        return []
    points = _from_stats(run)
    if len(points) < MIN_STATS:
        points = _from_commits(run, shard_tokens, shard_rows)
    if len(points) < 2:
        return []
    times, totals = np.array([p[0] for p in points]), np.array([p[1:] for p in points], dtype=float)
    totals = np.maximum.accumulate(totals)  # totals fall when a worker dies with what it had not committed
    edges = np.linspace(times[0], times[-1], min(len(points) - 1, MAX_INTERVALS) + 1)
    if edges[-1] <= edges[0]:
        return []
    prompt, generated, rows = (np.interp(edges, times, column) for column in totals.T)
    seconds = edges[1] - edges[0]
    return [
        Interval(_time(a), _time(b), dp / seconds, dg / seconds, done)
        for (a, b), dp, dg, done in zip(pairwise(edges), np.diff(prompt), np.diff(generated), rows[1:], strict=True)
    ]


def loads(run: RunEvents) -> list[IntervalLoad]:
    """Return a run's load by intervals between two stats samples; several of them are averaged where there are many."""
    pairs = [(start, end, sample) for (start, _), (end, sample) in pairwise(run.stats) if sample.workers]
    size = -(-len(pairs) // MAX_INTERVALS) or 1
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [_average(group[0][0], group[-1][1], [sample for *_, sample in group]) for group in groups]


Point = tuple[float, float, float, float]  # time, prompt tokens, generated tokens, rows: of the job so far


def _from_stats(run: RunEvents) -> list[Point]:
    """Return the totals over time since the first worker was ready; those at that time are the last ones before it."""
    before = [(at, sample) for at, sample in run.stats if at <= run.first_ready][-1:]
    after = [(at, sample) for at, sample in run.stats if at > run.first_ready]
    return [
        (max(at, run.first_ready).timestamp(), s.prompt_tokens, s.generated_tokens, s.rows_done)
        for at, s in before + after
    ]


def _from_commits(
    run: RunEvents, shard_tokens: Mapping[int, tuple[int, int]], shard_rows: Mapping[int, int]
) -> list[Point]:
    prompt, generated, rows = 0, 0, run.rows - run.pending
    points: list[Point] = [(run.first_ready.timestamp(), 0, 0, rows)]
    for at, shard in run.commits:
        new_prompt, new_generated = shard_tokens.get(shard, (0, 0))
        prompt, generated, rows = prompt + new_prompt, generated + new_generated, rows + shard_rows.get(shard, 0)
        points.append((at.timestamp(), prompt, generated, rows))
    return sorted(points)


def _average(start: datetime, end: datetime, samples: Sequence[StatsSample]) -> IntervalLoad:
    workers = [worker for sample in samples for worker in sample.workers]
    return IntervalLoad(
        start,
        end,
        seqs=sum(worker.seqs for worker in workers) / len(samples),
        waiting_seqs=sum(worker.waiting_seqs for worker in workers) / len(samples),
        busy=sum(worker.busy for worker in workers) / len(workers),
        kv_use=sum(worker.kv_use for worker in workers) / len(workers),
    )


def _time(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)
