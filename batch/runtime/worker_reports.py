"""WorkerReport and WorkerReports: what workers report every second, until the driver asks for it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from moray.batch.ledger import Progress
from moray.batch.run_events import ExpertTokens
from moray.batch.worker.stats import WorkerStats


@dataclass(frozen=True)
class WorkerReport:
    """Holds what a worker reports to the monitor.

    progress:       its shards in flight
    log:            the lines that it logged since the last report
    stalled_s:      how many seconds its engine has been in the present step
    expert_tokens:  tokens by [layers][experts] since the worker started; None where they were not read since the last
                    report
    """

    progress: Sequence[Progress]
    log: Sequence[str]
    stats: WorkerStats
    stalled_s: float = 0.0
    expert_tokens: Sequence[Sequence[int]] | None = None


class WorkerReports:
    """Keeps the latest report of each worker."""

    def __init__(self) -> None:
        self._progress: dict[str, Sequence[Progress]] = {}  # by actor
        self._stats: dict[str, WorkerStats] = {}  # by actor, until pop_stats returns them
        self._expert_tokens: dict[str, Sequence[Sequence[int]]] = {}  # by actor

    def store(self, actor: str, report: WorkerReport) -> None:
        """Replace the worker's report."""
        self._progress[actor] = report.progress
        self._stats[actor] = report.stats
        if report.expert_tokens is not None:
            self._expert_tokens[actor] = report.expert_tokens

    def drop(self, actor: str) -> tuple[list[int], ExpertTokens | None]:
        """Drop the report of a process that ended.

        Returns the shards that were in flight in it, and the tokens of its experts where it reported them.
        """
        self._stats.pop(actor, None)
        shards = sorted(progress.shard for progress in self._progress.pop(actor, ()))
        tokens = self._expert_tokens.pop(actor, None)
        return shards, None if tokens is None else ExpertTokens(actor, tokens)

    @property
    def progress(self) -> list[Progress]:
        """Return the state of every shard in flight."""
        return [progress for shards in self._progress.values() for progress in shards]

    def pop_stats(self) -> dict[str, WorkerStats]:
        """Return the statistics of each worker that has reported since the last call."""
        stats, self._stats = self._stats, {}
        return stats

    @property
    def expert_tokens(self) -> list[ExpertTokens]:
        """Return the tokens of the experts of each worker whose process has not ended."""
        return [ExpertTokens(actor, tokens) for actor, tokens in self._expert_tokens.items()]
