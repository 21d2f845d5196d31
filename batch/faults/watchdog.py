"""Watchdog: notices workers that hang, from outside, since one that hangs says nothing itself. Pure.

A worker reports every second, and how long its engine has been in its present step. So long as no row has a time limit
nothing is killed: nobody knows how long a step may take.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MIN_S = 10.0  # no step is taken for hung before, however short a row's time is
NOTE_S = 180.0  # without a limit: worth a line, and again after twice as long


@dataclass(frozen=True)
class Stall:
    """A worker that has done nothing for some time: no step of its engine came back, or it does not report at all.

    started:  of its process, see process.start_time
    """

    actor: str
    node: str
    pid: int
    started: str
    seconds: float


class Watchdog:
    """row_timeout_s: the job's; None = workers are not to be killed."""

    def __init__(self, row_timeout_s: float | None) -> None:
        self.row_timeout_s = row_timeout_s
        self._first_s = NOTE_S if row_timeout_s is None else max(row_timeout_s, MIN_S)
        self._due_s: dict[tuple[str, int], float] = {}  # by actor and process

    @property
    def kills(self) -> bool:
        return self.row_timeout_s is not None

    def check(self, stalls: Iterable[Stall]) -> list[Stall]:
        """Of the workers that are idle now, those that something is to be done about; each again after twice as long,
        should it not have helped."""
        found = []
        for stall in stalls:
            who = stall.actor, stall.pid
            if stall.seconds >= self._due_s.get(who, self._first_s):
                self._due_s[who] = 2 * stall.seconds
                found.append(stall)
        return found

    def reason(self, stall: Stall) -> str:
        limit = "" if self.row_timeout_s is None else f"; limits.row_timeout_s is {self.row_timeout_s:g}"
        return f"no step came back in {stall.seconds:.0f} s{limit}"
