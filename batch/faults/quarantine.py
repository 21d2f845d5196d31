"""Quarantine: which rows are suspected of ending their worker, and which of them did.

A worker's end takes every row down that is in it: a neighbour is not guilty. All of them are suspects, which from
then on run alone; one that survives is cleared, one whose worker ends again, twice, is not tried any more. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import JobError

MAX_STRIKES = 2
MAX_DEATHS = 5 * MAX_STRIKES  # of workers with one row in them, and no row that survived in between

RowId = tuple[int, int]  # shard, and place in its block


@dataclass(frozen=True)
class InFlight:
    """What was in a worker when it ended. is_alone: one row, on purpose."""

    rows: Sequence[RowId]
    is_alone: bool


@dataclass(frozen=True)
class Ending:
    """How a worker ended.

    code:    of a row that ends workers like this
    what:    it did
    reason:  where it is known
    """

    code: str
    what: str
    reason: str | None = None

    @classmethod
    def hung(cls, reason: str) -> "Ending":
        """It was killed, since it did nothing any more."""
        return cls("row_timeout", "hung", reason)

    @classmethod
    def failed(cls, reason: str) -> "Ending":
        """It ended itself after an exception in the engine."""
        return cls("engine_failed", "failed", reason)


KILLED = Ending("killed_worker", "died")


@dataclass(frozen=True)
class Suspect:
    """strikes: workers that ended while the row was alone in them. ending: of the last one."""

    strikes: int = 0
    ending: Ending = KILLED

    @property
    def is_guilty(self) -> bool:
        return self.strikes >= MAX_STRIKES

    @property
    def message(self) -> str:
        reason = f": {self.ending.reason}" if self.ending.reason else ""
        return f"{self.strikes} workers {self.ending.what} while it was alone in them{reason}"


class Quarantine:
    def __init__(self) -> None:
        self._suspects: dict[RowId, Suspect] = {}
        self._num_deaths = 0

    def blame(self, died: InFlight, ending: Ending = KILLED) -> None:
        """Raises JobError where whatever runs ends its worker, alone too: then it is not the rows."""
        for row in died.rows:
            before = self._suspects.get(row, Suspect())
            self._suspects[row] = Suspect(before.strikes + 1, ending) if died.is_alone else before
        self._num_deaths += died.is_alone
        if self._num_deaths > MAX_DEATHS:
            reason = f" ({ending.reason})" if ending.reason else ""
            raise JobError(
                f"workers {ending.what} {self._num_deaths} times with one row alone in them, and none survived: it is "
                f"the worker, not the rows{reason}. The logs of Ray's session say how they {ending.what}."
            )

    def suspects(self, shard: int) -> dict[int, Suspect]:
        """Rows of the shard that run alone; guilty ones not at all."""
        return {row: suspect for (of, row), suspect in self._suspects.items() if of == shard}

    def clear(self, row: RowId) -> None:
        """It ran alone and its worker lives."""
        self._suspects.pop(row, None)
        self._num_deaths = 0
