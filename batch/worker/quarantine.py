"""Quarantine: which rows are suspected of crashing their worker, and which of them did.

When a worker ends, every row in it may be the cause, so all of them become suspects. They are tried in two halves, each
apart from all other rows: a half that the worker survives is cleared, a half whose worker ends again is halved again.
So one bad row among n is alone after about log2(n) more crashes, and the other rows never wait for each other. A row
that was alone in MAX_SOLO_CRASHES workers that ended is not tried any more. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moray.engine.errors import JobError

MAX_SOLO_CRASHES = 2  # workers that one row may end while it is alone in them, before it is not tried any more
# solo crashes in a row, of any rows, with no worker that survived its row in between, after which the job ends
MAX_CONSECUTIVE_SOLO_CRASHES = 5 * MAX_SOLO_CRASHES

RowId = tuple[int, int]  # shard, and the row's place in its block


@dataclass(frozen=True)
class RowsInFlight:
    """Names the rows that were in a worker when it ended.

    is_trial:  True where they were suspects of one group, on purpose without any other row
    """

    rows: Sequence[RowId]
    is_trial: bool

    @property
    def is_alone(self) -> bool:
        return self.is_trial and len(self.rows) == 1


@dataclass(frozen=True)
class WorkerExit:
    """States how a worker ended.

    code:    error code for a row that ends workers like this
    verb:    what the worker did, in messages: "died", "hung" or "failed"
    reason:  why, where it is known
    """

    code: str
    verb: str
    reason: str | None = None

    @classmethod
    def hung(cls, reason: str) -> "WorkerExit":
        """Return the exit of a worker that was killed because it did nothing any more."""
        return cls("row_timeout", "hung", reason)

    @classmethod
    def failed(cls, reason: str) -> "WorkerExit":
        """Return the exit of a worker that ended itself after an exception in the engine."""
        return cls("engine_failed", "failed", reason)


KILLED = WorkerExit("killed_worker", "died")


@dataclass(frozen=True)
class Suspect:
    """Holds what is known of a row that may crash its worker.

    group:         suspects of one group are tried together
    solo_crashes:  how many workers ended while the row was alone in them
    worker_exit:   how the last of them ended
    """

    group: int
    solo_crashes: int = 0
    worker_exit: WorkerExit = KILLED

    @property
    def is_poison(self) -> bool:
        """Return whether the row has crashed so many workers that it is not tried any more."""
        return self.solo_crashes >= MAX_SOLO_CRASHES

    @property
    def message(self) -> str:
        """Return the text for the row's error."""
        reason = f": {self.worker_exit.reason}" if self.worker_exit.reason else ""
        return f"{self.solo_crashes} workers {self.worker_exit.verb} while it was alone in them{reason}"


class Quarantine:
    """Finds the rows that crash their worker, by trying suspects apart from all other rows."""

    def __init__(self) -> None:
        self._suspects: dict[RowId, Suspect] = {}
        self._num_groups = 0
        self._num_solo_crashes = 0

    def record_crash(self, lost_rows: RowsInFlight, worker_exit: WorkerExit = KILLED) -> None:
        """Record that a worker ended with these rows in it; all of them become suspects.

        Raises JobError where workers end whatever row is alone in them: then the rows are not the cause.
        """
        # In an ordinary crash, a row that is a suspect already keeps its group: among other rows it proves nothing.
        rows = [row for row in lost_rows.rows if lost_rows.is_trial or row not in self._suspects]
        half = (len(rows) + 1) // 2
        for half_rows in (rows[:half], rows[half:]):
            self._num_groups += 1
            for row in half_rows:
                suspect = replace(self._suspects.get(row, Suspect(0)), group=self._num_groups)
                if lost_rows.is_alone:
                    suspect = replace(suspect, solo_crashes=suspect.solo_crashes + 1, worker_exit=worker_exit)
                self._suspects[row] = suspect
        self._num_solo_crashes += lost_rows.is_alone
        if self._num_solo_crashes > MAX_CONSECUTIVE_SOLO_CRASHES:
            reason = f" ({worker_exit.reason})" if worker_exit.reason else ""
            raise JobError(
                f"workers {worker_exit.verb} {self._num_solo_crashes} times with one row alone in them, and none "
                f"survived: it is the worker, not the rows{reason}. The logs of Ray's session say how they "
                f"{worker_exit.verb}."
            )

    def suspects(self, shard: int) -> dict[int, Suspect]:
        """Return the suspects of a shard by row.

        Each must be tried apart from other rows, and a poison row not at all.
        """
        return {row: suspect for (owner, row), suspect in self._suspects.items() if owner == shard}

    def clear(self, row: RowId) -> None:
        """Clear a row that was tried in a worker that survived."""
        self._suspects.pop(row, None)
        self._num_solo_crashes = 0
