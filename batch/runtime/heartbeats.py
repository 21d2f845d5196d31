"""Heartbeats: finds the workers that do nothing, from the times of their reports. Pure."""

from collections.abc import Callable
from dataclasses import replace

from moray.batch.runtime.hang_detector import StalledWorker

STALL_AFTER_S = 5.0  # seconds without a step or a report after which a worker is stalled; it reports every second


class Heartbeats:
    """Keeps when each worker last reported, and how long its engine had been in its step then.

    clock:  seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, StalledWorker]] = {}  # by worker: when it last reported, and its state then

    def begin(self, actor: str, node: str, pid: int, started: str) -> None:
        """Record that a worker is ready and reports from now on.

        started:  start time of its process; see process.start_time
        """
        self._last[actor] = self._clock(), StalledWorker(actor, node, pid, started, 0.0)

    def beat(self, actor: str, stalled_s: float) -> None:
        """Record a report of a worker, whose engine has been in its step for so many seconds."""
        if actor in self._last:
            self._last[actor] = self._clock(), replace(self._last[actor][1], seconds=stalled_s)

    def forget(self, actor: str) -> None:
        """Drop a worker whose process has ended."""
        self._last.pop(actor, None)

    def stalls(self) -> list[StalledWorker]:
        """Return the workers that have done nothing for STALL_AFTER_S, including those that are gone for good."""
        now_s = self._clock()
        stalls = [replace(state, seconds=state.seconds + now_s - at_s) for at_s, state in self._last.values()]
        return [stall for stall in stalls if stall.seconds > STALL_AFTER_S]
