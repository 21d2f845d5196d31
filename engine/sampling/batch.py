"""Batch: which of a step's samples need more than their column of parameters. It is kept while they stay the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from moray.engine.sampling.logit_processors import LogitProcessor
from moray.engine.sampling.running_sample import RunningSample


@dataclass(frozen=True)
class Traits:
    """Holds what is found out about a sample once.

    processors: the logit processors that may change the logits of some of its tokens
    logprobs:   how many best tokens to return with each token; None = no logprobs
    """

    processors: tuple[LogitProcessor, ...]
    logprobs: int | None

    @classmethod
    def of(cls, sample: RunningSample, processors: Sequence[LogitProcessor]) -> "Traits":
        """Find out about a sample."""
        return cls(tuple(p for p in processors if p.may_apply_to(sample)), sample.params.logprobs)

    @property
    def is_plain(self) -> bool:
        """Return whether the sampling kernel alone is enough for the sample."""
        return not self.processors and self.logprobs is None


@dataclass(frozen=True)
class Batch:
    """Holds the samples of a step.

    processors:  the logit processors, in order, that may apply to some samples, each with their rows
    logprobs:    row -> how many best tokens to return, for the samples that asked for logprobs
    """

    samples: list[RunningSample]
    processors: tuple[tuple[LogitProcessor, list[int]], ...]
    logprobs: dict[int, int]

    @classmethod
    def of(
        cls, samples: Sequence[RunningSample], traits: dict[int, Traits], processors: Sequence[LogitProcessor]
    ) -> "Batch":
        """Make a batch. traits: those that are not plain, by row; processors: all, in order"""
        rows_of = ((p, [row for row, of_row in traits.items() if p in of_row.processors]) for p in processors)
        logprobs = {row: of_row.logprobs for row, of_row in traits.items() if of_row.logprobs is not None}
        return cls(list(samples), tuple((p, rows) for p, rows in rows_of if rows), logprobs)

    def changes(self) -> list[tuple[LogitProcessor, list[int]]]:
        """Return the processors that change logits in this step, in order, each with the rows that it changes."""
        applied = ((p, [row for row in rows if p.applies_to(self.samples[row])]) for p, rows in self.processors)
        return [(p, rows) for p, rows in applied if rows]
