"""HungWorkerKiller: ends workers that hang, so that Ray starts them again.

Import this only after ray_session has set Ray up.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moray.batch.processes.process import end_process
from moray.batch.runtime.hang_detector import HangDetector, StalledWorker
from moray.batch.worker.quarantine import WorkerExit


class HungWorkerKiller:
    """Kills the process of a worker that hangs, by a task on the worker's node: such a process does not end itself.

    Ray then starts the worker again, and Quarantine finds the row.
    """

    def __init__(self, detector: HangDetector, monitor: Any) -> None:
        self._detector = detector
        self._monitor = monitor
        self._pending: list[tuple[Any, StalledWorker]] = []

    def check(self, stalls: Sequence[StalledWorker]) -> Iterator[tuple[StalledWorker, str]]:
        """Act on the workers that hang. Yields each one whose process was found, with a message about it."""
        for stall in self._detector.check(stalls):
            if self._detector.kills_workers:
                self._monitor.expect_exit.remote(stall.actor, WorkerExit.hung(self._detector.reason(stall)))
            self._pending.append((_send(stall, kill=self._detector.kills_workers), stall))
        pending, self._pending = self._pending, []
        for answer, stall in pending:
            if not ray.wait([answer], timeout=0)[0]:
                self._pending.append((answer, stall))
            elif _was_found(answer):
                yield stall, self._describe(stall)
            else:  # Ray Data has released the worker, or its node is lost
                self._monitor.forget.remote(stall.actor)

    def end_all(self, stalls: Sequence[StalledWorker]) -> None:
        """Kill stalled workers when the job is over: they do not react when Ray asks them to exit."""
        answers = [_send(stall, kill=True) for stall in stalls]
        ray.wait(answers, num_returns=len(answers), timeout=5.0) if answers else None

    def _describe(self, stall: StalledWorker) -> str:
        which = f"worker {stall.pid} on node {stall.node[:8]} hangs: {self._detector.reason(stall)}"
        if self._detector.kills_workers:
            return f"{which}. It was killed; its rows run again, one at a time."
        return f"{which}. With limits.row_timeout_s it would be killed and the row found."


def _send(stall: StalledWorker, *, kill: bool) -> Any:
    on_node = NodeAffinitySchedulingStrategy(stall.node, soft=False)
    remote: Any = ray.remote
    task = remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(end_process)
    return task.remote(stall.pid, stall.started, kill=kill)


def _was_found(answer: Any) -> bool:
    try:
        return bool(ray.get(answer))
    except RayError:
        return False
