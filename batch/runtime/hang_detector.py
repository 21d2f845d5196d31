"""HangDetector: notices hanging workers from outside, because a worker that hangs does not report it. Pure.

A worker reports every second how long its engine has been in its present step. Without a time limit for rows nothing is
killed: nobody knows how long a step may take.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MIN_STALL_S = 10.0  # no step counts as hung sooner than this, however short row_timeout_s is
REPORT_AFTER_S = 180.0  # seconds until a stall is reported where rows have no time limit, and again after twice as long


@dataclass(frozen=True)
class StalledWorker:
    """Describes a worker that has done nothing for some time: its engine finished no step, or it sends no reports.

    started:  start time of its process; see process.start_time
    seconds:  how long it has done nothing
    """

    actor: str
    node: str
    pid: int
    started: str
    seconds: float


class HangDetector:
    """Decides which stalled workers to act on.

    row_timeout_s:  the job's limit for a row in seconds; None = workers are not to be killed
    """

    def __init__(self, row_timeout_s: float | None) -> None:
        self.row_timeout_s = row_timeout_s
        self._first_s = REPORT_AFTER_S if row_timeout_s is None else max(row_timeout_s, MIN_STALL_S)
        self._due_s: dict[tuple[str, int], float] = {}  # by actor and process

    @property
    def kills_workers(self) -> bool:
        return self.row_timeout_s is not None

    def check(self, stalls: Iterable[StalledWorker]) -> list[StalledWorker]:
        """Return the stalled workers to act on now.

        A worker that is still stalled is returned again once it has been stalled for twice as long.
        """
        found = []
        for stall in stalls:
            key = stall.actor, stall.pid
            if stall.seconds >= self._due_s.get(key, self._first_s):
                self._due_s[key] = 2 * stall.seconds
                found.append(stall)
        return found

    def reason(self, stall: StalledWorker) -> str:
        """Return the text that explains why the worker counts as hanging."""
        limit = "" if self.row_timeout_s is None else f"; limits.row_timeout_s is {self.row_timeout_s:g}"
        return f"no step came back in {stall.seconds:.0f} s{limit}"
