"""Quarantine: which rows are suspected of killing their worker, and which of them did.

A worker's death takes every row down that is in it: a neighbour is not guilty. All of them are suspects, which from
then on run alone; one that survives is cleared, one whose worker dies again, twice, is not tried any more. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import JobError

MAX_STRIKES = 2
MAX_DEATHS = 5 * MAX_STRIKES  # of workers with one row in them, and no row that survived in between

RowId = tuple[int, int]  # shard, and place in its block


@dataclass(frozen=True)
class InFlight:
    """What was in a worker when it died. is_alone: one row, on purpose."""

    rows: Sequence[RowId]
    is_alone: bool


class Quarantine:
    def __init__(self) -> None:
        self._strikes: dict[RowId, int] = {}
        self._num_deaths = 0

    def blame(self, died: InFlight) -> None:
        """Raises JobError where whatever runs dies, alone too: then it is not the rows."""
        for row in died.rows:
            self._strikes[row] = self._strikes.get(row, 0) + died.is_alone
        self._num_deaths += died.is_alone
        if self._num_deaths > MAX_DEATHS:
            raise JobError(
                f"workers died {self._num_deaths} times with one row alone in them, and none survived: it is the "
                "worker, not the rows. The logs of Ray's session say how they died."
            )

    def suspects(self, shard: int) -> dict[int, int]:
        """Rows of the shard that run alone, with their strikes; at MAX_STRIKES not at all."""
        return {row: strikes for (of, row), strikes in self._strikes.items() if of == shard}

    def clear(self, row: RowId) -> None:
        """It ran alone and its worker lives."""
        self._strikes.pop(row, None)
        self._num_deaths = 0
