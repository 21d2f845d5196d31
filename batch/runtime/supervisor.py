"""Supervisor: starts a job's pipeline and watches it until the ledger says that the job is over."""

import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from moray.batch.forecast.sample_plan import SamplePlan
from moray.batch.ledger import Command, Committed, Ended, Event, State, TimedOut
from moray.batch.run_events import (
    WORKER,
    AbortCommanded,
    ActorReady,
    DrainCommanded,
    Draining,
    RayReport,
    ShardCommitted,
    WorkerHung,
)
from moray.batch.runtime.progress_reporting import ProgressReporter
from moray.batch.runtime.ray_watch import MonitorLost
from moray.batch.runtime.run_context import RunContext
from moray.batch.runtime.run_forecast import RunForecast
from moray.batch.runtime.startup_timeout import StartupTimeout
from moray.engine.errors import MorayError

if TYPE_CHECKING:  # Ray is imported only when its environment is set: see ray_session
    from moray.batch.runtime.job_actors import JobActors
    from moray.batch.runtime.monitor import MonitorUpdate

TICK_S = 0.5  # seconds that one round of the loop waits for an event, at most
ABORT_S = 5.0  # seconds after which an aborted pipeline that has not ended is abandoned
# by command: its event, and what a person is told
_COMMANDS: Mapping[Command, tuple[type[DrainCommanded | AbortCommanded], str]] = {
    Command.DRAIN: (
        DrainCommanded,
        "no new rows are started, those in flight are finished and kept; once more to stop at once",
    ),
    Command.ABORT: (AbortCommanded, "stopping at once"),
}


class Supervisor:
    """Passes events from a queue to the ledger, and the ledger's commands to the stages through the monitor.

    inbox:  events for the ledger; an exception is how the pipeline broke off, a text is a report of Ray's daemons
    """

    def __init__(self, context: RunContext, progress: ProgressReporter, forecast: RunForecast) -> None:
        self.inbox: SimpleQueue[Event | Exception | str] = SimpleQueue()
        self._context = context
        self._ledger = context.ledger
        self._progress = progress
        self._reporter = progress.reporter
        self._workers = progress.workers
        self._forecast = forecast
        self._startup_timeout: StartupTimeout  # made by `drive`, like all that needs Ray
        self._command: Command | None = None
        self._is_draining = False
        self._abandon_at_s = float("inf")

    def drive(self, sample_plan: SamplePlan | None, *, is_cluster: bool) -> None:
        """Run the pipeline from the first shard to a final state of the job.

        sample_plan:  the rows to read for the forecast; None where the job has a forecast already
        is_cluster:   True on a Ray cluster, to which nodes may be added and on which files outlive the job

        Raises the exception that ended the pipeline, or JobError where no worker became ready in time.
        """
        from moray.batch.runtime.cluster_nodes import cluster_nodes
        from moray.batch.runtime.job_actors import JobActors
        from moray.batch.runtime.pipeline import choose_for_cluster
        from moray.batch.runtime.prometheus import JobMetrics
        from moray.batch.runtime.stage_config import StageConfig

        context, spec = self._context, self._context.job.spec
        resources = choose_for_cluster(context.job, can_grow=is_cluster)
        self._workers.gpus_each = resources.worker.gpus
        self._progress.metrics = JobMetrics(spec.name)
        self._forecast.resources = resources
        self._startup_timeout = StartupTimeout(
            {"prepare": resources.io_actor, WORKER: resources.worker, "commit": resources.io_actor},
            spec.workers.start_timeout_s,
            cluster_nodes,
            began_s=self._reporter.elapsed_s,
            is_own=not is_cluster,
        )
        config = StageConfig.from_job(
            context.job,
            context.name,
            resources,
            sample_plan,
            committed=context.ledger.committed,
            merges=context.is_retry,
        )
        actors = JobActors(context, config, resources, self.inbox)
        try:
            self._watch(actors)
        finally:
            for expert_tokens in actors.end(at_once=self.is_aborting or not self._ledger.state.is_final):
                self._reporter.record(expert_tokens)
            if is_cluster:
                actors.remove_journals()

    def _watch(self, actors: "JobActors") -> None:
        """Handle what happens until the job is over; the end is shown only when everything is reported."""
        from ray.exceptions import RayError

        while not self._ledger.state.is_final:
            broken_off = self.read_inbox()
            if broken_off is not None:  # Ray's exception has at most a text; the stage reports its own to the monitor
                raise self._apply_last(actors) or broken_off
            if (update := actors.poll(self._command)) is not None:
                self._apply(update)
                self._account(update)
                self._report_hung(actors)
            self._check_timeouts()
            if not self._ledger.state.is_final:
                self._progress.show()
        if self._ledger.state is not State.FAILED:
            with suppress(RayError, MonitorLost):  # an error after the last commits is no reason to fail
                self._apply_last(actors)

    @property
    def is_aborting(self) -> bool:
        """Return whether the pipeline is to end at once."""
        return self._command is Command.ABORT

    def read_inbox(self, timeout_s: float = TICK_S) -> Exception | None:
        """Wait up to `timeout_s` for an item, then handle all items that are there.

        Returns the exception that the pipeline ended with, as soon as it is reached; None where there is none.
        """
        item: Event | Exception | str
        while True:
            try:
                item = self.inbox.get(timeout=timeout_s)
            except Empty:
                return None
            timeout_s = 0.0
            if isinstance(item, Exception):
                return item
            if isinstance(item, str):
                self._reporter.record(RayReport(item))
            else:
                self.handle(item)

    def handle(self, event: Event) -> None:
        """Pass an event to the ledger and carry out the commands that it returns."""
        if isinstance(event, Committed):
            self._reporter.record(ShardCommitted(event.shard, event.counts.ok, event.counts.failed))
            self._context.link.report_commit()
        for command in self._ledger.handle(event):
            self._command = command
            reason, (event_class, note) = self._ledger.stopping_reason, _COMMANDS[command]
            self._reporter.record(event_class(reason))
            self._progress.note(f"{reason}: {note}")
            if command is Command.ABORT:
                self._abandon_at_s = time.monotonic() + ABORT_S
            self._progress.show(at_once=True)  # SIGKILL may follow the signal
        if self._ledger.state.is_final:
            self._reporter.end()

    def _apply(self, update: "MonitorUpdate") -> None:
        """Record the events, statistics and sample of an update of the monitor."""
        now_s = time.monotonic()
        for event in update.events:
            self._reporter.record(event)
            self._startup_timeout.on_event(event)
            at_s = now_s
            if isinstance(event, ActorReady) and event.actor in update.ready_s:
                at_s = update.asked_s - update.ready_s[event.actor]  # the monitor answered when it was asked
            self._workers.on_event(event, at_s)
        for actor, stats in update.stats.items():
            self._workers.update_stats(actor, stats, now_s)
        if update.sample is not None:
            self._forecast.on_sample(update.sample)

    def _apply_last(self, actors: "JobActors") -> MorayError | None:
        """Record what happened until the pipeline ended.

        Returns the failure that a stage reported to the monitor. Raises MonitorLost where the monitor is gone.
        """
        failure: MorayError | None = None
        for update in actors.last_updates(self._command):
            self._apply(update)
            failure = failure or update.failure
        return failure

    def _account(self, update: "MonitorUpdate") -> None:
        """Pass what an update says about shards and workers to the ledger."""
        events: list[Event] = [*update.lost, *update.progress]
        for event in events:
            self.handle(event)
        if update.admitted is not None:
            self._drain([shard for shard in update.admitted if shard not in self._ledger.committed])

    def _drain(self, in_flight: list[int]) -> None:
        """End the run once the shards in flight have committed.

        The shards that were not admitted need not pass through the pipeline as empty blocks.
        """
        if not self._is_draining:
            self._is_draining = True
            self._reporter.record(Draining(in_flight))
        if not in_flight:
            self.handle(Ended())

    def _report_hung(self, actors: "JobActors") -> None:
        for stall, what in actors.hung_workers():
            self._reporter.record(WorkerHung(stall.actor, stall.pid, round(stall.seconds, 1)))
            self._progress.note(what[0].upper() + what[1:])

    def _check_timeouts(self) -> None:
        limit_s = self._context.job.spec.limits.job_timeout_s
        if limit_s is not None and self._reporter.job_elapsed_s > limit_s:
            self.handle(TimedOut(limit_s))
        if waiting := self._startup_timeout.check(self._reporter.elapsed_s):
            self._progress.note(waiting)
        if time.monotonic() > self._abandon_at_s:
            self.handle(Ended())
