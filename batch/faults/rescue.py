"""Rescue: what the driver does about workers that hang. Not to be imported before ray_session has set Ray up."""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch.faults.process import end_process
from batch.faults.quarantine import Ending
from batch.faults.watchdog import Stall, Watchdog


class Rescue:
    """Sends a task to the node of a worker that hangs, to kill its process: what hangs does not end itself. Ray then
    starts the worker again, and Quarantine finds the row."""

    def __init__(self, watchdog: Watchdog, monitor: Any) -> None:
        self._watchdog = watchdog
        self._monitor = monitor
        self._sent: list[tuple[Any, Stall]] = []

    def check(self, stalls: Sequence[Stall]) -> Iterator[tuple[Stall, str]]:
        """Act on those that hang. Yields each whose process was found, and what became of it."""
        for stall in self._watchdog.check(stalls):
            if self._watchdog.kills:
                self._monitor.expect_end.remote(stall.actor, Ending.hung(self._watchdog.reason(stall)))
            self._sent.append((_send(stall, kill=self._watchdog.kills), stall))
        sent, self._sent = self._sent, []
        for answer, stall in sent:
            if not ray.wait([answer], timeout=0)[0]:
                self._sent.append((answer, stall))
            elif _was_found(answer):
                yield stall, self._describe(stall)
            else:  # Ray Data has released it, or its node is lost
                self._monitor.forget.remote(stall.actor)

    def end_all(self, stalls: Sequence[Stall]) -> None:
        """The job is over: Ray asks workers to end, which those that hang do not hear."""
        answers = [_send(stall, kill=True) for stall in stalls]
        ray.wait(answers, num_returns=len(answers), timeout=5.0) if answers else None

    def _describe(self, stall: Stall) -> str:
        which = f"worker {stall.pid} on node {stall.node[:8]} hangs: {self._watchdog.reason(stall)}"
        if self._watchdog.kills:
            return f"{which}. It was killed; its rows run again, one at a time."
        return f"{which}. With limits.row_timeout_s it would be killed and the row found."


def _send(stall: Stall, *, kill: bool) -> Any:
    there = NodeAffinitySchedulingStrategy(stall.node, soft=False)
    remote: Any = ray.remote
    task = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(end_process)
    return task.remote(stall.pid, stall.started, kill=kill)


def _was_found(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except RayError:
        return False
