"""Batch: what follows from the samples of a step alone. It is kept as long as the same samples are sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

from moray.engine.sampling.logit_processors import LogitProcessor
from moray.engine.sampling.running_sample import RunningSample


@dataclass(frozen=True)
class Batch:
    """Holds the samples of a step, and who may change their logits.

    processors:  the logit processors, in order, that may apply to some samples, each with their rows
    logprobs:    row -> how many best tokens to return, for the samples that asked for logprobs
    """

    samples: list[RunningSample]
    processors: tuple[tuple[LogitProcessor, list[int]], ...]
    logprobs: dict[int, int]

    @classmethod
    def of(cls, samples: Sequence[RunningSample], processors: Sequence[LogitProcessor]) -> "Batch":
        """Make the batch of some samples."""
        may_apply = ((p, [row for row, sample in enumerate(samples) if p.may_apply_to(sample)]) for p in processors)
        ks = enumerate(sample.params.logprobs for sample in samples)
        return cls(
            list(samples), tuple((p, rows) for p, rows in may_apply if rows), {i: k for i, k in ks if k is not None}
        )

    def changes(self) -> list[tuple[LogitProcessor, list[int]]]:
        """Return the processors that change logits in this step, in order, each with the rows that it changes."""
        applied = ((p, [row for row in rows if p.applies_to(self.samples[row])]) for p, rows in self.processors)
        return [(p, rows) for p, rows in applied if rows]
