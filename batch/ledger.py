"""The ledger of a job: which shards are committed, what they held, and how the job ends.

Pure: events in, orders out; no clock, no files, no Ray. The driver feeds it and carries out what it orders.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from batch.quantities import count
from engine.errors import JobError

MAX_LOSSES = 5  # of one worker without a commit in between: more would go on forever


class State(StrEnum):
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
    """What a part file holds: input rows, tokens, and seconds the engine worked for it."""

    ok: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    engine_s: float = 0.0
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.ok + self.failed


@dataclass(frozen=True)
class Committed:
    """A part file lies under its name."""

    shard: int
    counts: Counts


@dataclass(frozen=True)
class Progress:
    """What a worker has done of a shard, in this attempt: rows finished, tokens of them and of those still running."""

    shard: int
    rows: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker died: what it had not committed is to be done again.

    has_suspects: it is known which rows were in it, and they will be tried alone
    """

    worker: str
    shards: Sequence[int]
    has_suspects: bool = False


@dataclass(frozen=True)
class Signalled:
    """The user asks for the end: a tidy one first, one at once when they ask again."""

    name: str


@dataclass(frozen=True)
class TimedOut:
    seconds: float


@dataclass(frozen=True)
class Ended:
    """The pipeline is over; `error` is why it stopped early."""

    error: str | None = None


class Order(StrEnum):
    DRAIN = "drain"  # admit no new shard; what is in flight commits
    ABORT = "abort"  # end at once


Event = Committed | Progress | WorkerLost | Signalled | TimedOut | Ended


class Ledger:
    """Accounts for every input row: input = ok + failed + pending, always.

    shards:           input rows of each shard, by its number
    committed:        parts that are there already
    max_failed_rows:  None = no limit, but not all rows may fail
    stops_at_limit:   with more failed rows nothing is begun or gone on with; else the limit counts at the end
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
        self.rows_of = tuple(shards)
        self.num_rows = sum(shards)
        self.committed: dict[int, Counts] = {}
        self.running: dict[int, Progress] = {}
        self.ok = self.failed = 0
        self.errors: Counter[str] = Counter()
        self._prompt_tokens = self._generated_tokens = 0
        self._stopping: tuple[State, str] | None = None
        self._signalled = self._aborting = False
        self._losses: Counter[str] = Counter()
        for shard, counts in (committed or {}).items():
            self._commit(shard, counts)
        if self.is_complete or (stops_at_limit and self.has_too_many_failures):
            self._end(None)

    @property
    def stopping_reason(self) -> str | None:
        """Why the job is being stopped, when it is."""
        return None if self._stopping is None else self._stopping[1]

    @property
    def pending(self) -> int:
        return self.num_rows - self.ok - self.failed

    @property
    def is_complete(self) -> bool:
        return len(self.committed) == len(self.rows_of)

    @property
    def pending_shards(self) -> list[int]:
        return [shard for shard in range(len(self.rows_of)) if shard not in self.committed]

    @property
    def rows_done(self) -> int:
        """Rows of committed shards, and rows finished in the others."""
        return self.ok + self.failed + sum(p.rows for p in self.running.values())

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens + sum(p.prompt_tokens for p in self.running.values())

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens + sum(p.generated_tokens for p in self.running.values())

    def handle(self, event: Event) -> list[Order]:
        """Take an event into account; late and repeated ones do no harm.

        Raises JobError on a commit that does not fit the plan.
        """
        orders: list[Order] = []
        match event:
            case Committed(shard, counts):
                self._commit(shard, counts)
                if self._stops_at_limit and self.has_too_many_failures:
                    orders += self._stop(State.FAILED, self._failures)
            case Progress(shard):
                if shard not in self.committed and not self.state.is_final:
                    self.running[shard] = event
            case WorkerLost(worker, shards, has_suspects):
                for shard in shards:
                    self.running.pop(shard, None)
                self._losses[worker] += not has_suspects
                if self._losses[worker] >= MAX_LOSSES:
                    message = f"a worker died {MAX_LOSSES} times and finished no shard in between"
                    orders += self._abort(State.FAILED, message)
            case Signalled(name):
                end = self._abort if self._signalled else self._stop
                self._signalled = True
                orders += end(State.CANCELLED, name)
            case TimedOut(seconds):
                orders += self._abort(State.FAILED, f"job_timeout_s ({seconds:g}) is over")
            case Ended(error):
                self._end(error)
        if self.state is State.PENDING and isinstance(event, Committed | Progress):
            self.state = State.RUNNING
        return orders

    @property
    def has_too_many_failures(self) -> bool:
        return self.max_failed_rows is not None and self.failed > self.max_failed_rows

    @property
    def _failures(self) -> str:
        return f"{count(self.failed, 'row')} failed; limits.max_failed_rows is {self.max_failed_rows:,}"

    def _commit(self, shard: int, counts: Counts) -> None:
        if not 0 <= shard < len(self.rows_of):
            raise JobError(f"shard {shard} was committed, but the plan has {len(self.rows_of)} shards")
        if counts.rows != self.rows_of[shard]:
            raise JobError(f"shard {shard} was committed with {counts.rows} rows; the plan has {self.rows_of[shard]}")
        before = self.committed.get(shard, Counts())  # a shard that ran twice: the last file is the one that is there
        self.committed[shard] = counts
        self.running.pop(shard, None)
        self._losses.clear()
        self.ok += counts.ok - before.ok
        self.failed += counts.failed - before.failed
        self.errors.update(counts.errors)
        self.errors.subtract(before.errors)
        self._prompt_tokens += counts.prompt_tokens - before.prompt_tokens
        self._generated_tokens += counts.generated_tokens - before.generated_tokens

    def _stop(self, state: State, reason: str) -> list[Order]:
        if self.state.is_final or self._stopping:
            return []
        self._stopping = (state, reason)
        return [Order.DRAIN]

    def _abort(self, state: State, reason: str) -> list[Order]:
        if self.state.is_final or self._aborting:
            return []
        self._aborting = True
        self._stopping = self._stopping or (state, reason)  # the first cause is the one to tell
        return [Order.ABORT]

    def _end(self, error: str | None) -> None:
        if self.state.is_final:
            return
        self.running.clear()
        if self._stopping and not self.is_complete:
            self.state, self.reason = self._stopping
        elif error and not self.is_complete:
            self.state, self.reason = State.FAILED, error
        elif self.has_too_many_failures:
            self.state, self.reason = State.FAILED, self._failures
        elif not self.is_complete:
            self.state, self.reason = State.FAILED, "the pipeline ended early"
        elif self.max_failed_rows is None and 0 < self.failed == self.num_rows:
            self.state = State.FAILED
            self.reason = "the only row failed" if self.failed == 1 else f"all {self.failed:,} rows failed"
        else:
            self.state, self.reason = State.SUCCEEDED, None
