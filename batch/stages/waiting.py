"""Waiting: the rows of a worker that wait for the engine, and which of them goes next. Pure; answers do not depend on
it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from batch.stages.shard_run import Row, ShardRun

FAIR_EVERY = 8  # rows: one of so many is the oldest, so that no shard stays without its last ones for long


@dataclass(frozen=True)
class Waiter:
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

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        self._waiters[self._num_added] = waiter
        self._num_added += 1

    def take(self, num_seqs: int) -> list[Waiter]:
        """The next ones, until they have so many samples or more."""
        taken: list[Waiter] = []
        numbers = list(islice(self._waiters, self._reach)) if num_seqs > 0 else []
        best_first = iter(sorted(numbers, key=lambda number: -self._waiters[number].num_cached()))  # stable
        while num_seqs > 0 and self._waiters:
            oldest = next(iter(self._waiters))
            is_oldests_turn = self._num_taken % FAIR_EVERY == 0
            rest = (number for number in best_first if number in self._waiters)
            taken.append(self._waiters.pop(oldest if is_oldests_turn else next(rest, oldest)))
            self._num_taken += 1
            num_seqs -= taken[-1].row.num_samples
        return taken
