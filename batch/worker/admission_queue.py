"""AdmissionQueue: the rows of a worker that wait for the engine, and the order in which they enter it.

Pure. The answers do not depend on the order.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard

OLDEST_EVERY = 8  # every this many rows the oldest is next, so that no shard waits long for its last rows
# The waiting rows are ranked again after window / RANKINGS_PER_WINDOW rows have been popped: looking up 512 long
# prompts in the prefix cache takes 2 ms.
RANKINGS_PER_WINDOW = 16


def none_cached() -> int:
    """Return 0, for a prompt too short for the prefix cache to hold."""
    return 0


class QueuedRow(NamedTuple):
    """Holds a row that waits for the engine.

    num_cached:  returns how many tokens of the row's prompt the prefix cache holds when it is called
    """

    shard: InFlightShard
    row: InFlightRow
    num_cached: Callable[[], int]


class AdmissionQueue:
    """Orders rows by how much of their prompt is in the prefix cache, most first, before it is evicted; ties go by age.

    window:  how many of the oldest rows are ranked
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._queued: dict[int, QueuedRow] = {}  # by number, oldest first
        self._num_added = self._num_popped = 0
        self._ranked: Iterator[int] = iter(())  # numbers as last ranked, best first; some may be gone
        self._next_ranking = 0  # the value of _num_popped at which to rank again

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, queued: QueuedRow) -> None:
        """Add a row as the newest."""
        self._queued[self._num_added] = queued
        self._num_added += 1

    def pop(self, num_seqs: int) -> list[QueuedRow]:
        """Remove and return the next rows, until they have at least `num_seqs` samples together."""
        popped: list[QueuedRow] = []
        if num_seqs > 0 and self._queued and self._num_popped >= self._next_ranking:
            self._rank()
        while num_seqs > 0 and self._queued:
            popped.append(self._queued.pop(self._next_number()))
            self._num_popped += 1
            num_seqs -= popped[-1].row.request.num_samples
        return popped

    def _rank(self) -> None:
        numbers = islice(self._queued, self._window)
        self._ranked = iter(sorted(numbers, key=lambda number: -self._queued[number].num_cached()))  # stable
        self._next_ranking = self._num_popped + self._window // RANKINGS_PER_WINDOW

    def _next_number(self) -> int:
        if self._num_popped % OLDEST_EVERY:
            for number in self._ranked:
                if number in self._queued:
                    return number
        return next(iter(self._queued))
