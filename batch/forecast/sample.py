"""Sample: some rows of a job as prepare finds them, and what they say of all its rows. Pure."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from batch.forecast.estimate import Range, estimate_total

BUCKETS = 12  # of a histogram, at most


@dataclass(frozen=True)
class SampledRow:
    """
    prompt_tokens:  None where the row failed before it came to tokens
    counted:        tokens that the engine reads for it: of prompt and continuations; 0 of one that fails
    least, most:    tokens that it may generate, over its samples; 0 of one that fails
    sequence:       tokens of its longest sequence in the KV cache, all generated; 0 of one that fails
    error:          code
    """

    prompt_tokens: int | None
    counted: int = 0
    least: int = 0
    most: int = 0
    sequence: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Bucket:
    """Rows whose prompt has first to last tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Sample:
    """
    input_rows:  of the job
    runs:        rows that lie together in the input, as they were drawn; of a small input one run with all rows
    reach:       share of each row group that rows were drawn from, its beginning: what lies behind was not looked at
    duplicates:  rows of the sample with the prompt of an earlier one
    shared_prefix:  tokens that all prompts of the sample begin with
    """

    input_rows: int
    runs: tuple[tuple[SampledRow, ...], ...]
    reach: float = 1.0
    duplicates: int = 0
    shared_prefix: int = 0

    @cached_property
    def rows(self) -> list[SampledRow]:
        return [row for run in self.runs for row in run]

    @property
    def is_whole(self) -> bool:
        """Every row of the job is in it."""
        return len(self.rows) == self.input_rows

    @cached_property
    def prompt_tokens(self) -> Range:
        """Of all rows that will run."""
        return self._total([[row.counted for row in run] for run in self.runs])

    @cached_property
    def generated_tokens(self) -> Range:
        """Of all rows: nothing is known but their limits."""
        least = self._total([[row.least for row in run] for run in self.runs])
        most = self._total([[row.most for row in run] for run in self.runs])
        known = least.expected if least == most and least.low == least.high else None
        return Range(known, least.low, most.high)

    @cached_property
    def errors(self) -> dict[str, int]:
        """Rows of the sample that fail, by code, most first."""
        return dict(Counter(row.error for row in self.rows if row.error is not None).most_common())

    def error_rows(self) -> dict[str, int]:
        """Rows of the job that will fail before they come to the engine, by code."""
        share = self.input_rows / max(1, len(self.rows))
        return {code: round(count * share) for code, count in self.errors.items()}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the prompts, shortest first."""
        return sorted(row.prompt_tokens for row in self.rows if row.prompt_tokens is not None)

    @cached_property
    def sequences(self) -> list[int]:
        """Tokens that the rows that run take in the KV cache at most, shortest first."""
        return sorted(row.sequence for row in self.rows if row.error is None)

    def _total(self, amounts: list[list[int]]) -> Range:
        if not self.input_rows:
            return Range(0, 0, 0)
        return estimate_total([(len(run), sum(run)) for run in amounts], self.input_rows)


def histogram(lengths: Sequence[int]) -> list[Bucket]:
    """Lengths in buckets of one width that hold 99% of them, and one with all that are longer. lengths: sorted"""
    if not lengths:
        return []
    usual, longest = percentile(lengths, 0.99), lengths[-1]
    sizes = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(size for size in sizes if size * BUCKETS > usual)
    first = lengths[0] // width
    edges = [width * (i + 1) for i in range(first, usual // width + 1)]
    if longest >= edges[-1]:
        edges.append(longest + 1)
    firsts = [width * first, *edges]
    counts = Counter(bisect_right(edges, length) for length in lengths)
    return [Bucket(low, high - 1, counts[i]) for i, (low, high) in enumerate(zip(firsts, edges, strict=False))]


def percentile(lengths: Sequence[int], share: float) -> int:
    """The smallest length that `share` of them do not exceed. lengths: sorted, at least one"""
    return lengths[max(0, math.ceil(share * len(lengths)) - 1)]
