"""Curves: a run's speed and queue by intervals of time, from its figures or, where there are few, from its commits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np

from batch.report.events import Figures, Run

MIN_FIGURES = 5  # of a run whose workers are ready, to draw it from them
MAX_INTERVALS = 120


@dataclass(frozen=True)
class Interval:
    """rows_done: of the whole job, at its end"""

    start: datetime
    end: datetime
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    rows_done: float


@dataclass(frozen=True)
class Load:
    """All workers together, on average over the interval; busy and kv_use as shares of 1."""

    start: datetime
    end: datetime
    seqs: float
    waiting_seqs: float
    busy: float
    kv_use: float


def speeds(run: Run, tokens_of: Mapping[int, tuple[int, int]], rows_of: Mapping[int, int]) -> list[Interval]:
    """tokens_of, rows_of: of the shards that are committed. Of a retry nothing: what it commits it did not all do."""
    if run.is_retry:
        return []
    points = _from_figures(run)
    if len(points) < MIN_FIGURES:
        points = _from_commits(run, tokens_of, rows_of)
    if len(points) < 2:
        return []
    times, totals = np.array([p[0] for p in points]), np.array([p[1:] for p in points], dtype=float)
    totals = np.maximum.accumulate(totals)  # a worker that dies takes what it had not committed with it
    edges = np.linspace(times[0], times[-1], min(len(points) - 1, MAX_INTERVALS) + 1)
    if edges[-1] <= edges[0]:
        return []
    prompt, generated, rows = (np.interp(edges, times, column) for column in totals.T)
    seconds = edges[1] - edges[0]
    return [
        Interval(_time(a), _time(b), dp / seconds, dg / seconds, done)
        for (a, b), dp, dg, done in zip(pairwise(edges), np.diff(prompt), np.diff(generated), rows[1:], strict=True)
    ]


def loads(run: Run) -> list[Load]:
    """Between one telling and the next, as the next tells; several of them together where there are many."""
    pairs = [(before.at, figures) for before, figures in pairwise(run.figures) if figures.workers]
    size = -(-len(pairs) // MAX_INTERVALS) or 1
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [_average(group[0][0], [figures for _, figures in group]) for group in groups]


Point = tuple[float, float, float, float]  # time, prompt tokens, generated tokens, rows: of the job so far


def _from_figures(run: Run) -> list[Point]:
    """From when the first worker was ready: what was told last before is as it was then."""
    before = [figures for figures in run.figures if figures.at <= run.first_ready][-1:]
    after = [figures for figures in run.figures if figures.at > run.first_ready]
    return [
        (max(f.at, run.first_ready).timestamp(), f.prompt_tokens, f.generated_tokens, f.rows_done)
        for f in before + after
    ]


def _from_commits(run: Run, tokens_of: Mapping[int, tuple[int, int]], rows_of: Mapping[int, int]) -> list[Point]:
    prompt, generated, rows = 0, 0, run.rows - run.pending
    points: list[Point] = [(run.first_ready.timestamp(), 0, 0, rows)]
    for at, shard in run.commits:
        of_prompt, of_generated = tokens_of.get(shard, (0, 0))
        prompt, generated, rows = prompt + of_prompt, generated + of_generated, rows + rows_of.get(shard, 0)
        points.append((at.timestamp(), prompt, generated, rows))
    return sorted(points)


def _average(start: datetime, group: Sequence[Figures]) -> Load:
    def total(name: str) -> float:
        return sum(float(worker.get(name, 0)) for figures in group for worker in figures.workers)

    tellings = sum(len(figures.workers) for figures in group)
    seqs, waiting = total("seqs") / len(group), total("waiting_seqs") / len(group)
    return Load(start, group[-1].at, seqs, waiting, total("busy") / tellings, total("kv_use") / tellings)


def _time(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)
