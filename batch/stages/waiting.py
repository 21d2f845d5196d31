"""Waiting: the rows of a worker that wait for the engine, and which of them goes next. Pure; answers do not depend on
it."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from batch.stages.shard_run import Row, ShardRun

FAIR_EVERY = 8  # rows: one of so many is the oldest, so that no shard stays without its last ones for long
LOOKS = 16  # at the prefix cache while as many rows are taken as are looked at: a look at 512 long prompts takes 2 ms


def none_cached() -> int:
    """Of a prompt that the prefix cache cannot hold."""
    return 0


class Waiter(NamedTuple):
    """num_cached: how many tokens of its prompt the prefix cache holds, as it is when called"""

    run: ShardRun
    row: Row
    num_cached: Callable[[], int]


class Waiting:
    """Those go first that find most in the prefix cache, before it is gone from there; among equals the oldest.

    reach: how many are looked at, of the oldest
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._waiters: dict[int, Waiter] = {}  # by number, oldest first
        self._num_added = self._num_taken = 0
        self._best_first: Iterator[int] = iter(())  # as it was when last looked at; some may be gone
        self._look_at = 0  # rows taken

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        self._waiters[self._num_added] = waiter
        self._num_added += 1

    def take(self, num_seqs: int) -> list[Waiter]:
        """The next ones, until they have so many samples or more."""
        taken: list[Waiter] = []
        if num_seqs > 0 and self._waiters and self._num_taken >= self._look_at:
            self._look()
        while num_seqs > 0 and self._waiters:
            taken.append(self._waiters.pop(self._next()))
            self._num_taken += 1
            num_seqs -= taken[-1].row.num_samples
        return taken

    def _look(self) -> None:
        numbers = islice(self._waiters, self._reach)
        self._best_first = iter(sorted(numbers, key=lambda number: -self._waiters[number].num_cached()))  # stable
        self._look_at = self._num_taken + self._reach // LOOKS

    def _next(self) -> int:
        if self._num_taken % FAIR_EVERY:
            for number in self._best_first:
                if number in self._waiters:
                    return number
        return next(iter(self._waiters))
