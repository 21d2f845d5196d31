"""From runs of rows drawn at random to the total over all rows, with a 95% confidence range. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Range:
    """expected: None = not known; low, high: what it lies between"""

    expected: int | None
    low: int
    high: int


def estimate_total(runs: Sequence[tuple[int, float]], num_rows: int) -> Range:
    """The total over num_rows rows, of which some runs were drawn, each as likely as any other and none twice.

    runs: (rows, amount) of each; rows of one run may be alike, runs are not taken to be

    Cochran, Sampling Techniques (3rd ed.), 6.3 with clusters as units: a ratio estimate, of a finite population.
    """
    rows = sum(count for count, _ in runs)
    seen = sum(amount for _, amount in runs)
    if rows >= num_rows:
        return Range(round(seen), round(seen), round(seen))
    if rows == 0 or len(runs) < 2:
        raise ValueError(f"{len(runs)} runs with {rows} rows tell nothing of {num_rows} rows")
    mean = seen / rows
    squares = sum((amount - mean * count) ** 2 for count, amount in runs) / (len(runs) - 1)
    mean_rows = rows / len(runs)
    error = math.sqrt((1 - rows / num_rows) * squares / len(runs)) / mean_rows
    half = student_t(len(runs) - 1) * error * num_rows
    total = mean * num_rows
    return Range(round(total), max(round(seen), math.floor(total - half)), math.ceil(total + half))


def student_t(degrees: int) -> float:
    """The two-sided 95% point of Student's t; within 1% from 5 degrees on (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
