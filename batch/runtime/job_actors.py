"""JobActors: the actors of a running job as its driver sees them, the pipeline's and the monitor.

Import this only after ray_session has set Ray up.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from moray.batch.format_error import format_error
from moray.batch.ledger import Command, Ended, Event
from moray.batch.plan.resources import Resources
from moray.batch.run_events import WORKER, ActorStarted, ExpertTokens
from moray.batch.runtime.hang_detector import HangDetector, StalledWorker
from moray.batch.runtime.hung_workers import HungWorkerKiller
from moray.batch.runtime.monitor import MonitorUpdate, start_monitor
from moray.batch.runtime.monitor_client import remove_journals
from moray.batch.runtime.pipeline import run_pipeline
from moray.batch.runtime.ray_watch import MonitorLost
from moray.batch.runtime.run_context import RunContext
from moray.batch.runtime.stage_config import StageConfig

POLL_TIMEOUT_S = 10.0  # seconds; the monitor answers within milliseconds
END_S = 5.0  # seconds allowed for the end of the pipeline; what is left of it does no harm


class JobActors:
    """Runs the pipeline in a thread of its own, polls the monitor, and ends both.

    inbox:  gets a Committed for each part, and at the end Ended or the exception that the pipeline broke off with
    """

    def __init__(
        self,
        context: RunContext,
        config: StageConfig,
        resources: Resources,
        inbox: "SimpleQueue[Event | Exception | str]",
    ) -> None:
        self._context = context
        self._config = config
        self._resources = resources
        self._inbox = inbox
        self._monitor = start_monitor(config.monitor)
        self._killer = HungWorkerKiller(HangDetector(context.job.spec.limits.row_timeout_s), self._monitor)
        self._pipeline = Thread(target=self._run_pipeline, name="pipeline", daemon=True)
        self._stalls: list[StalledWorker] = []
        self._worker_nodes: set[str] = set()
        self._pipeline.start()
        self._ask(None)

    def poll(self, command: Command | None) -> MonitorUpdate | None:
        """Return the monitor's update, and ask for the next one; None where it has not answered yet.

        Raises MonitorLost where the monitor is gone.
        """
        if not ray.wait([self._answer], timeout=0)[0]:
            return None
        update = self._receive()
        self._ask(command)
        return update

    def last_updates(self, command: Command | None) -> list[MonitorUpdate]:
        """Return all updates that the driver does not have, once the pipeline has ended.

        Raises MonitorLost where the monitor is gone, and RayError where it does not answer.
        """
        first = self._receive()
        self._ask(command)
        return [first, self._receive()]

    def hung_workers(self) -> Iterator[tuple[StalledWorker, str]]:
        """Kill the workers that hang, where rows have a time limit. Yields those that were found, with a message."""
        return self._killer.check(self._stalls)

    def end(self, *, at_once: bool) -> list[ExpertTokens]:
        """End all actors and return the experts' tokens of the workers that have not died.

        at_once:  do not wait for workers that hang
        """
        if at_once:
            self._killer.end_all(self._stalls)
        expert_tokens: list[ExpertTokens] = []
        with suppress(RayError):  # the monitor may be gone
            expert_tokens = ray.get(self._monitor.expert_tokens.remote(), timeout=POLL_TIMEOUT_S)
        ray.kill(self._monitor)  # what is left of the pipeline fails without it
        self._pipeline.join(END_S)
        return expert_tokens

    def remove_journals(self) -> None:
        """Remove the journals of the job's workers, on a cluster whose files outlive the job."""
        remove_journals(self._config.monitor, self._worker_nodes)

    def _ask(self, command: Command | None) -> None:
        self._answer: Any = self._monitor.poll.remote(command)
        self._asked_s = time.monotonic()

    def _receive(self) -> MonitorUpdate:
        try:
            update: MonitorUpdate = ray.get(self._answer, timeout=POLL_TIMEOUT_S)
        except RayActorError as error:
            raise MonitorLost(f"the job's monitor actor is gone: {format_error(error)}") from error
        update.asked_s = self._asked_s
        self._stalls = update.stalls
        started = [event for event in update.events if isinstance(event, ActorStarted)]
        self._worker_nodes |= {event.node for event in started if event.stage == WORKER}
        return update

    def _run_pipeline(self) -> None:
        context = self._context
        try:
            for committed in run_pipeline(self._config, context.job.plan, context.pending_shards, self._resources):
                self._inbox.put(committed)
            self._inbox.put(Ended())
        except Exception as failure:
            self._inbox.put(failure)
