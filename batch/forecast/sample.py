"""PromptSample: some rows of a job as prepare sees them, and estimates for all rows from them. Pure."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moray.batch.forecast.estimate import EstimatedRange, estimate_total

BUCKETS = 12  # most buckets of a histogram


@dataclass(frozen=True)
class SampledPrompt:
    """Holds the lengths of one row. All but prompt_tokens are 0 for a row that fails.

    prompt_tokens:    None where the row failed before it was tokenized
    prefill_tokens:   tokens of prompt and continuations, which the engine reads
    min_generated, max_generated:  bounds on the tokens that it generates, over its samples
    sequence_tokens:  tokens of its longest sequence in the KV cache at full length
    error:            code of its error
    """

    prompt_tokens: int | None
    prefill_tokens: int = 0
    min_generated: int = 0
    max_generated: int = 0
    sequence_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Bucket:
    """Counts the rows whose prompts have `first` to `last` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class PromptSample:
    """Holds a sample of a job's rows and estimates totals over all rows from it.

    input_rows:       rows of the job
    runs:             runs of adjacent rows as they were sampled; a small input is completely in it, one run a file
    scanned_fraction: share of each row group, from its start, that rows were sampled from; the rest was not read
    duplicates:       rows of the sample with the prompt of an earlier one
    shared_prefix:    tokens that all prompts of the sample begin with
    double_bos:       rows of the sample whose text has a beginning-of-sequence token and gets another one
    """

    input_rows: int
    runs: tuple[tuple[SampledPrompt, ...], ...]
    scanned_fraction: float = 1.0
    duplicates: int = 0
    shared_prefix: int = 0
    double_bos: int = 0

    @cached_property
    def rows(self) -> list[SampledPrompt]:
        return [row for run in self.runs for row in run]

    @property
    def is_whole(self) -> bool:
        """Return whether every row of the job is in the sample."""
        return len(self.rows) == self.input_rows

    @cached_property
    def prompt_tokens(self) -> EstimatedRange:
        """Estimate the tokens that the engine reads for all rows that run."""
        return self._total([[row.prefill_tokens for row in run] for run in self.runs])

    @cached_property
    def generated_tokens(self) -> EstimatedRange:
        """Estimate the tokens that all rows generate: bounds only, unless each row's number is fixed."""
        low = self._total([[row.min_generated for row in run] for run in self.runs])
        high = self._total([[row.max_generated for row in run] for run in self.runs])
        known = low.expected if low == high and low.low == low.high else None
        return EstimatedRange(known, low.low, high.high)

    @cached_property
    def errors(self) -> dict[str, int]:
        """Count the rows of the sample that fail, by code, most first."""
        return dict(Counter(row.error for row in self.rows if row.error is not None).most_common())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return lines about the prompts that a person should read."""
        if not self.double_bos:
            return ()
        rows = f"{self.double_bos:,} of {len(self.rows):,} rows{'' if self.is_whole else ' of the sample'}"
        return (
            f"{rows} begin with two beginning-of-sequence tokens, their own and the tokenizer's; "
            "template.bos: never adds none",
        )

    def error_rows(self) -> dict[str, int]:
        """Estimate how many rows of the job will fail before they reach the engine, by code."""
        share = self.input_rows / max(1, len(self.rows))
        return {code: round(count * share) for code, count in self.errors.items()}

    @cached_property
    def lengths(self) -> list[int]:
        """Return the lengths of the prompts in tokens, shortest first."""
        return sorted(row.prompt_tokens for row in self.rows if row.prompt_tokens is not None)

    @cached_property
    def sequences(self) -> list[int]:
        """Return the tokens in the KV cache of each row that runs, at full length, shortest first."""
        return sorted(row.sequence_tokens for row in self.rows if row.error is None)

    def _total(self, amounts: list[list[int]]) -> EstimatedRange:
        if not self.input_rows:
            return EstimatedRange(0, 0, 0)
        return estimate_total([(len(run), sum(run)) for run in amounts], self.input_rows)


def histogram(lengths: Sequence[int]) -> list[Bucket]:
    """Count lengths in buckets of one width that hold 99% of them, and one bucket for all that are longer.

    lengths: sorted
    """
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
    """Return the smallest length that a `share` of them, from 0 to 1, do not exceed.

    lengths: sorted, at least one
    """
    return lengths[max(0, math.ceil(share * len(lengths)) - 1)]
