"""MonitorActor: the Ray actor between driver and stages.

It passes the driver's commands on and collects progress, failures and events.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moray.batch.forecast.sample import PromptSample
from moray.batch.ledger import Command, Progress, WorkerLost
from moray.batch.run_events import ActorReady, ExpertTokens, LogLine, NoForecast, RunEvent
from moray.batch.runtime.admission_gate import AdmissionGate
from moray.batch.runtime.crash_tracker import CrashTracker
from moray.batch.runtime.hang_detector import StalledWorker
from moray.batch.runtime.heartbeats import Heartbeats
from moray.batch.runtime.start_tracker import StartTracker
from moray.batch.runtime.worker_reports import WorkerReport, WorkerReports
from moray.batch.worker.quarantine import RowsInFlight, Suspect, WorkerExit
from moray.batch.worker.stats import WorkerStats
from moray.engine.errors import JobError, MorayError


@dataclass
class MonitorUpdate:
    """Holds what happened since the driver last polled the monitor.

    asked_s:   when the driver polled, by its own monotonic clock; the driver sets it
    progress:  the state of every shard in flight
    ready_s:   actor -> seconds since it became ready, for the actors that have an ActorReady event in this update
    stats:     actor -> statistics, for the workers that have reported since the last poll
    lost:      workers whose process died
    events:    events for the run's log, in order
    stalls:    workers that have done nothing for some seconds, including those that are gone for good
    admitted:  the shards that were admitted, once no more are; None before that
    sample:    the sample of the input, once it is collected
    failure:   the first failure that ends the job
    """

    asked_s: float = 0.0
    progress: list[Progress] = field(default_factory=list)
    ready_s: Mapping[str, float] = field(default_factory=dict)
    stats: Mapping[str, WorkerStats] = field(default_factory=dict)
    lost: list[WorkerLost] = field(default_factory=list)
    events: list[RunEvent] = field(default_factory=list)
    stalls: list[StalledWorker] = field(default_factory=list)
    admitted: list[int] | None = None
    sample: PromptSample | None = None
    failure: MorayError | None = None


class MonitorActor:
    """Puts together what the driver must know of a job's actors.

    Actors are known by Ray's actor id, which an actor keeps when Ray starts it again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._update = MonitorUpdate()
        self._gate = AdmissionGate()
        self._starts = StartTracker(self._emit, clock)
        self._crashes = CrashTracker(self._emit)
        self._heartbeats = Heartbeats(clock)
        self._reports = WorkerReports()
        self._is_sample_claimed = False

    def _emit(self, event: RunEvent) -> None:
        self._update.events.append(event)

    def poll(self, command: Command | None) -> MonitorUpdate:
        """Set the command for the stages and return what happened since the last poll. Called by the driver."""
        self._gate.command = command
        update, self._update = self._update, MonitorUpdate(failure=self._update.failure)
        update.admitted = self._gate.admitted
        update.progress = self._reports.progress
        update.stats = self._reports.pop_stats()
        update.ready_s = self._starts.pop_ready_s()
        update.stalls = self._heartbeats.stalls()
        return update

    def expert_tokens(self) -> list[ExpertTokens]:
        """Return the events of the experts of all workers that have not died. Called by the driver at the end."""
        return self._reports.expert_tokens

    def fail(self, failure: MorayError) -> None:
        """Store a failure that ends the job, unless there is one already."""
        self._update.failure = self._update.failure or failure

    def is_open(self) -> bool:
        """Return whether new shards may start."""
        return self._gate.is_open

    def admit(self, shard: int) -> dict[int, Suspect] | None:
        """Admit a shard to a worker and return its suspects by row; None where no shard may start any more."""
        return self._crashes.suspects(shard) if self._gate.admit(shard) else None

    def clear(self, shard: int, row: int) -> None:
        """Clear a suspect whose worker survived it."""
        self._crashes.clear(shard, row)

    def start(self, actor: str, stage: str, node: str, lost_rows: RowsInFlight | None = None) -> None:
        """Record that an actor begins to start.

        lost_rows:  the rows that were in its last process when that died, where this is known

        Raises JobError where the actor has failed to start too often.
        """
        self._heartbeats.forget(actor)
        shards, expert_tokens = self._reports.drop(actor)
        if self._crashes.was_ready(actor):
            self._update.lost.append(WorkerLost(actor, shards, has_suspects=lost_rows is not None))
        try:
            self._crashes.start(actor, stage, lost_rows)
            if expert_tokens is not None:
                self._emit(expert_tokens)
            self._starts.begin(actor, stage, node)
        except JobError as error:
            self.fail(error)  # the driver would get only the text of what is raised here
            raise

    def report_failed_start(self, actor: str, stage: str, node: str, reason: str) -> float:
        """Record that an actor could not start and is about to exit, so that Ray starts it again where there is room.

        Returns how many seconds it must wait before it exits. Raises JobError where no actor of the stage can be
        started.
        """
        try:
            return self._starts.fail(actor, stage, node, reason)
        except JobError as error:
            self.fail(error)
            raise

    def ready(self, event: ActorReady, started: str = "") -> None:
        """Record that an actor is ready.

        started:  start time of its process where it will send reports from now on, else empty; see process.start_time
        """
        self._crashes.ready(event.actor, event.pid)
        if started:
            self._heartbeats.begin(event.actor, event.node, event.pid, started)
        self._starts.ready(event)

    def beat(self, actor: str) -> None:
        """Record that an actor that is ready, and sends no reports, is alive."""
        self._starts.beat(actor)

    def report(self, actor: str, report: WorkerReport) -> Command | None:
        """Store a worker's report and return the command that it is to follow."""
        self._starts.beat(actor)
        self._heartbeats.beat(actor, report.stalled_s)
        self._reports.store(actor, report)
        for line in report.log:
            self._emit(LogLine(actor, line))
        return self._gate.command

    def expect_exit(self, actor: str, worker_exit: WorkerExit) -> None:
        """Record why a worker is about to exit."""
        self._crashes.expect_exit(actor, worker_exit)

    def forget(self, actor: str) -> None:
        """Drop a worker that is gone for good."""
        self._crashes.forget(actor)
        self._heartbeats.forget(actor)

    def claim_sample(self) -> bool:
        """Return whether the caller is to collect the sample of the input; True for the first caller only."""
        claimed, self._is_sample_claimed = self._is_sample_claimed, True
        return not claimed

    def submit_sample(self, sample: PromptSample | None, reason: str = "") -> None:
        """Store the sample of the input, or the reason why there is none."""
        self._update.sample = sample
        if sample is None:
            self._emit(NoForecast(reason))


def start_monitor(name: str) -> Any:
    """Start the monitor actor on the driver's node, which neither autoscaling nor a spot market takes away.

    It is never restarted: a job whose monitor is gone must end, because nobody could stop it.
    """
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "num_cpus": 0, "max_restarts": 0, "scheduling_strategy": on_this_node}
    return ray.remote(MonitorActor).options(**options).remote()
