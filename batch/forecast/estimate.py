"""Estimate a total over all rows from runs of rows sampled at random, with a 95% confidence interval. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moray.batch.student_t import student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class EstimatedRange:
    """Holds an estimate.

    expected:   None = not known
    low, high:  bounds of the interval
    """

    expected: int | None
    low: int
    high: int


def estimate_total(runs: Sequence[tuple[int, float]], num_rows: int) -> EstimatedRange:
    """Estimate the total over num_rows rows, of which some runs were sampled with equal probability and without
    replacement.

    runs: (rows, amount) of each run; rows of one run may be alike, runs are assumed to be independent

    Raises ValueError where fewer than two runs were sampled and rows are missing.

    Cochran, Sampling Techniques (3rd ed.), 6.3 with clusters as units: a ratio estimate, of a finite population.
    """
    rows = sum(count for count, _ in runs)
    seen = sum(amount for _, amount in runs)
    if rows >= num_rows:
        return EstimatedRange(round(seen), round(seen), round(seen))
    if rows == 0 or len(runs) < 2:
        raise ValueError(f"{len(runs)} runs with {rows} rows are too few to estimate {num_rows} rows")
    mean = seen / rows
    squares = sum((amount - mean * count) ** 2 for count, amount in runs) / (len(runs) - 1)
    mean_rows = rows / len(runs)
    error = math.sqrt((1 - rows / num_rows) * squares / len(runs)) / mean_rows
    half = student_t(len(runs) - 1, CONFIDENCE) * error * num_rows
    total = mean * num_rows
    return EstimatedRange(round(total), max(round(seen), math.floor(total - half)), math.ceil(total + half))
