"""The ledger of a job: which shards are committed, what their parts hold, and how the job ends.

Pure: it takes events and returns commands; it has no clock, no files and no Ray. The driver feeds it events and carries
out its commands.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from moray.batch.units import count
from moray.engine.errors import JobError

MAX_WORKER_LOSSES = 5  # losses of one worker without a commit in between; with more, the job would go on forever


class State(StrEnum):
    """The state of a job."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Counts:
    """Counts the rows, samples and tokens of a part.

    ok, failed:                       input rows
    prompt_tokens, generated_tokens:  tokens of the rows that are ok
    engine_s:                         seconds that the engine worked for it
    copied:                           rows that got the answer of an equal row
    errors:                           failed rows by error code
    cut:                              rows that are ok with a structured output that max_tokens cut
    """

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    engine_s: float = 0.0
    copied: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0

    @property
    def rows(self) -> int:
        return self.ok + self.failed

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a part records them: without `copied` and `cut` where they are 0, as older versions."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("copied", "cut")}


@dataclass(frozen=True)
class Committed:
    """A part was published under its final name."""

    shard: int
    counts: Counts


@dataclass(frozen=True)
class Progress:
    """Reports how far a worker is with a shard, in this attempt.

    rows:  rows that are finished
    prompt_tokens, generated_tokens:  tokens of finished rows and of those still running
    """

    shard: int
    rows: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker died; what it had not committed must be done again.

    shards:        the shards that were in it
    has_suspects:  True where the rows in it are known, and will be tried apart from others
    """

    worker: str
    shards: Sequence[int]
    has_suspects: bool = False


@dataclass(frozen=True)
class SignalReceived:
    """The user asks for the end of the job: an orderly one at first, an immediate one when they ask again.

    name:  the signal's name
    """

    name: str


@dataclass(frozen=True)
class TimedOut:
    """The job has run for longer than its limit, which is `seconds`."""

    seconds: float


@dataclass(frozen=True)
class Ended:
    """The pipeline is over.

    error:  why it stopped early; None where it did not
    """

    error: str | None = None


class Command(StrEnum):
    """Orders the stages to finish what is in flight, or to stop at once."""

    DRAIN = "drain"  # admit no new shard; what is in flight commits
    ABORT = "abort"  # end at once


Event = Committed | Progress | WorkerLost | SignalReceived | TimedOut | Ended


class Ledger:
    """Accounts for every input row: input = ok + failed + pending, always.

    shards:           input rows of each shard, by its number
    committed:        the parts that exist already
    max_failed_rows:  failed rows that the job accepts; None = no limit, but not all rows may fail
    stops_at_limit:   True stops the job as soon as more rows have failed; False applies the limit at the end
    """

    def __init__(
        self,
        shards: Sequence[int],
        committed: Mapping[int, Counts] | None = None,
        max_failed_rows: int | None = None,
        *,
        stops_at_limit: bool = True,
    ) -> None:
        self.state = State.PENDING
        self.reason: str | None = None  # why it is not SUCCEEDED
        self.max_failed_rows = max_failed_rows
        self._stops_at_limit = stops_at_limit
        self.shard_rows = tuple(shards)
        self.num_rows = sum(shards)
        self.committed: dict[int, Counts] = {}
        self.running: dict[int, Progress] = {}
        self.ok = self.failed = self.cut = 0
        self.errors: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = 0
        self._stopping: tuple[State, str] | None = None
        self._has_signal = self._is_aborting = False
        self._worker_losses: Counter[str] = Counter()
        for shard, counts in (committed or {}).items():
            self._commit(shard, counts)
        if self.is_complete or (stops_at_limit and self.has_too_many_failures):
            self._end(None)

    @property
    def stopping_reason(self) -> str | None:
        """Return why the job is being stopped; None where it is not."""
        return None if self._stopping is None else self._stopping[1]

    @property
    def pending(self) -> int:
        return self.num_rows - self.ok - self.failed

    @property
    def is_complete(self) -> bool:
        return len(self.committed) == len(self.shard_rows)

    @property
    def pending_shards(self) -> list[int]:
        return [shard for shard in range(len(self.shard_rows)) if shard not in self.committed]

    @property
    def rows_done(self) -> int:
        """Return the rows of committed shards plus the rows finished in the shards in flight."""
        return self.ok + self.failed + sum(progress.rows for progress in self.running.values())

    @property
    def copied(self) -> int:
        """Return the rows of committed shards that got the answer of an equal row."""
        return sum(counts.copied for counts in self.committed.values())

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens + sum(progress.prompt_tokens for progress in self.running.values())

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens + sum(progress.generated_tokens for progress in self.running.values())

    def handle(self, event: Event) -> list[Command]:
        """Account for an event and return the commands that follow; late and repeated events do no harm.

        Raises JobError on a commit that does not fit the plan.
        """
        commands: list[Command] = []
        match event:
            case Committed(shard, counts):
                self._commit(shard, counts)
                if self._stops_at_limit and self.has_too_many_failures:
                    commands += self._stop(State.FAILED, self._failure_limit_message)
            case Progress(shard):
                if shard not in self.committed and not self.state.is_final:
                    self.running[shard] = event
            case WorkerLost(worker, shards, has_suspects):
                for shard in shards:
                    self.running.pop(shard, None)
                self._worker_losses[worker] += not has_suspects
                if self._worker_losses[worker] >= MAX_WORKER_LOSSES:
                    message = f"a worker died {MAX_WORKER_LOSSES} times and finished no shard in between"
                    commands += self._abort(State.FAILED, message)
            case SignalReceived(name):
                end = self._abort if self._has_signal else self._stop
                self._has_signal = True
                commands += end(State.CANCELLED, name)
            case TimedOut(seconds):
                commands += self._abort(State.FAILED, f"job_timeout_s ({seconds:g}) is over")
            case Ended(error):
                self._end(error)
        if self.state is State.PENDING and isinstance(event, Committed | Progress):
            self.state = State.RUNNING
        return commands

    @property
    def has_too_many_failures(self) -> bool:
        return self.max_failed_rows is not None and self.failed > self.max_failed_rows

    @property
    def _failure_limit_message(self) -> str:
        return f"{count(self.failed, 'row')} failed; limits.max_failed_rows is {self.max_failed_rows:,}"

    def _commit(self, shard: int, counts: Counts) -> None:
        if not 0 <= shard < len(self.shard_rows):
            raise JobError(f"shard {shard} was committed, but the plan has {len(self.shard_rows)} shards")
        if counts.rows != self.shard_rows[shard]:
            raise JobError(
                f"shard {shard} was committed with {counts.rows} rows; the plan has {self.shard_rows[shard]}"
            )
        previous = self.committed.get(shard, Counts())  # a shard that ran twice has the file of its last run
        self.committed[shard] = counts
        self.running.pop(shard, None)
        self._worker_losses.clear()
        self.ok += counts.ok - previous.ok
        self.failed += counts.failed - previous.failed
        self.cut += counts.cut - previous.cut
        self.errors.update(counts.errors)
        self.errors.subtract(previous.errors)
        self._prompt_tokens += counts.prompt_tokens - previous.prompt_tokens
        self._generated_tokens += counts.generated_tokens - previous.generated_tokens

    def _stop(self, state: State, reason: str) -> list[Command]:
        if self.state.is_final or self._stopping:
            return []
        self._stopping = (state, reason)
        return [Command.DRAIN]

    def _abort(self, state: State, reason: str) -> list[Command]:
        if self.state.is_final or self._is_aborting:
            return []
        self._is_aborting = True
        self._stopping = self._stopping or (state, reason)  # the first cause is the one to report
        return [Command.ABORT]

    def _end(self, error: str | None) -> None:
        if self.state.is_final:
            return
        self.running.clear()
        if self._stopping and not self.is_complete:
            self.state, self.reason = self._stopping
        elif error and not self.is_complete:
            self.state, self.reason = State.FAILED, error
        elif self.has_too_many_failures:
            self.state, self.reason = State.FAILED, self._failure_limit_message
        elif not self.is_complete:
            self.state, self.reason = State.FAILED, "the pipeline ended early"
        elif self.max_failed_rows is None and 0 < self.failed == self.num_rows:
            self.state = State.FAILED
            self.reason = "the only row failed" if self.failed == 1 else f"all {self.failed:,} rows failed"
        else:
            self.state, self.reason = State.SUCCEEDED, None
