"""Supervisor: has a job's pipeline run and watches over it, until the ledger says that the job is over."""

import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from batch.faults.watchdog import Stall, Watchdog
from batch.forecast.draw import Draw
from batch.forecast.first import FirstForecast
from batch.ledger import Committed, Ended, Event, Ledger, Order, State, TimedOut
from batch.placement.start_watch import StartWatch
from batch.planning.plan import Shard
from batch.planning.planner import PlannedJob
from batch.watch.audience import Audience
from batch.watch.status import Reporter
from batch.watch.workers import Workers

if TYPE_CHECKING:  # Ray is imported when its environment is settled: see ray_session
    from batch.faults.rescue import Rescue
    from batch.monitor import News
    from batch.placement.resources import Resources
    from batch.stages.side import Setup

TICK_S = 0.5
NEWS_S = 10.0  # the monitor's answer takes milliseconds
ABORT_S = 5.0  # an aborted pipeline that has not ended by then is left behind


class Supervisor:
    """Events come in through a queue, the ledger takes them, its orders go out through the monitor.

    again:  of a retry, the rows to run, by shard
    inbox:  events; an exception is how the pipeline broke; a text is a report of Ray's daemons
    """

    def __init__(
        self,
        job: PlannedJob,
        ledger: Ledger,
        reporter: Reporter,
        workers: Workers,
        audience: Audience,
        forecast: FirstForecast,
        again: Mapping[int, Shard] | None,
    ) -> None:
        self.inbox: SimpleQueue[Event | Exception | str] = SimpleQueue()
        self._job = job
        self._ledger = ledger
        self._reporter = reporter
        self._workers = workers
        self._audience = audience
        self._forecast = forecast
        self._again = again
        self._resources: Resources | None = None
        self._order: Order | None = None
        self._start_watch: StartWatch | None = None
        self._stalls: list[Stall] = []
        self._is_draining = False
        self._abandon_at_s = float("inf")

    def drive(self, draw: Draw | None, *, can_grow: bool) -> None:
        """From the first shard to a final state.

        draw:      rows for the forecast; None = it is there
        can_grow:  nodes may still come

        Raises what ended the pipeline, JobError where no worker came to life in time.
        """
        import ray

        from batch.faults.rescue import Rescue
        from batch.monitor import start_monitor
        from batch.pipeline import choose_for_cluster, cluster_nodes
        from batch.stages.side import Setup
        from batch.watch.metrics import JobMetrics

        spec = self._job.spec
        self._resources = resources = choose_for_cluster(self._job, can_grow=can_grow)
        self._workers.gpus_each = resources.worker.gpus
        self._audience.metrics = JobMetrics(spec.name)
        stages = {"prepare": resources.side, "worker": resources.worker, "commit": resources.side}
        self._start_watch = StartWatch(stages, spec.workers.start_timeout_s, cluster_nodes)
        setup = Setup.of(self._job, self._reporter.run, draw, merges=self._again is not None)
        monitor = start_monitor(setup.monitor)
        rescue = Rescue(Watchdog(spec.limits.row_timeout_s), monitor)
        pipeline = Thread(target=self._run_pipeline, args=(setup, resources), name="pipeline", daemon=True)
        try:
            pipeline.start()
            news: Any = monitor.poll.remote(self._order)
            asked_s = time.monotonic()
            while not self._ledger.state.is_final:
                broken = self.read_inbox()
                if broken is not None:  # Ray's exception has a text at best; the stage itself told the monitor
                    raise ray.get(monitor.poll.remote(self._order), timeout=NEWS_S).failure or broken
                if ray.wait([news], timeout=0)[0]:
                    self._take_news(ray.get(news), asked_s)
                    news, asked_s = monitor.poll.remote(self._order), time.monotonic()
                    self._rescue(rescue)
                self._check_time()
                if not self._ledger.state.is_final:  # the end is shown once all of it is told
                    self._audience.show()
            if self._ledger.state is not State.FAILED:
                with suppress(ray.exceptions.RayError):  # what came with the last commits is no reason to fail
                    for last in (news, monitor.poll.remote(self._order)):
                        self._take_notes(ray.get(last, timeout=NEWS_S), asked_s)
                        asked_s = time.monotonic()
        finally:
            if self.is_aborting or not self._ledger.state.is_final:
                rescue.end_all(self._stalls)
            with suppress(ray.exceptions.RayError):  # a monitor that is gone cannot tell
                for name, fields in ray.get(monitor.experts.remote(), timeout=NEWS_S):
                    self._reporter.record(name, **fields)
            ray.kill(monitor)  # what of the pipeline still runs fails by that
            pipeline.join(ABORT_S)

    @property
    def is_aborting(self) -> bool:
        """Whether all is to end at once."""
        return self._order is Order.ABORT

    def handle(self, event: Event) -> None:
        """Have the ledger take it, and follow its orders."""
        if isinstance(event, Committed):
            self._reporter.record("committed", shard=event.shard, ok=event.counts.ok, failed=event.counts.failed)
        for order in self._ledger.handle(event):
            self._order = order
            self._reporter.record(order, reason=self._ledger.stopping_reason)
            self._audience.note(f"{self._ledger.stopping_reason}: {_MEANING[order]}")
            if order is Order.ABORT:
                self._abandon_at_s = time.monotonic() + ABORT_S
            self._audience.show(at_once=True)  # what sent the signal may kill us next
        if self._ledger.state.is_final:
            self._reporter.end()

    def _run_pipeline(self, setup: "Setup", resources: "Resources") -> None:
        """In a thread of its own; what happens there goes into the inbox."""
        from batch.pipeline import run_pipeline

        try:
            plan = self._job.plan
            todo = plan.shards if self._again is None else self._again
            shards = [todo[index] for index in self._ledger.pending_shards]
            for committed in run_pipeline(setup, plan, shards, resources):
                self.inbox.put(committed)
            self.inbox.put(Ended())
        except Exception as failure:
            self.inbox.put(failure)

    def read_inbox(self, timeout_s: float = TICK_S) -> Exception | None:
        """Wait for something, a tick at most, and handle all that is there, up to the pipeline's end."""
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
                self._reporter.record("ray", report=item)
            else:
                self.handle(item)

    def _take_notes(self, news: "News", asked_s: float) -> None:
        """asked_s: when the monitor was asked, which answers at once"""
        self._stalls = news.stalls
        now_s = time.monotonic()
        for name, fields in news.notes:
            self._reporter.record(name, **fields)
            is_ready = name == "actor_ready" and fields["actor"] in news.ready_s
            self._workers.take(name, fields, asked_s - news.ready_s[fields["actor"]] if is_ready else now_s)
            if self._start_watch is not None:
                self._start_watch.take(name, fields)
        for actor, figures in news.figures.items():
            self._workers.hear(actor, figures, now_s)
        if news.sample is not None and self._resources is not None:
            self._forecast.take(news.sample, self._resources)

    def _take_news(self, news: "News", asked_s: float) -> None:
        self._take_notes(news, asked_s)
        events: list[Event] = [*news.lost, *news.progress]
        for event in events:
            self.handle(event)
        if news.admitted is not None:
            self._drain([shard for shard in news.admitted if shard not in self._ledger.committed])

    def _rescue(self, rescue: "Rescue") -> None:
        for stall, what in rescue.check(self._stalls):
            self._reporter.record("worker_hangs", actor=stall.actor, pid=stall.pid, seconds=round(stall.seconds, 1))
            self._audience.note(what[0].upper() + what[1:])

    def _drain(self, in_flight: list[int]) -> None:
        """Once what is in flight has committed the run is over: the shards behind it need not pass through empty."""
        if not self._is_draining:
            self._is_draining = True
            self._reporter.record("draining", shards=in_flight)
        if not in_flight:
            self.handle(Ended())

    def _check_time(self) -> None:
        limit_s = self._job.spec.limits.job_timeout_s
        if limit_s is not None and self._reporter.elapsed_s > limit_s:
            self.handle(TimedOut(limit_s))
        if self._start_watch is not None and (waiting := self._start_watch.check(self._reporter.elapsed_s)):
            self._audience.note(waiting)
        if time.monotonic() > self._abandon_at_s:
            self.handle(Ended())


_MEANING = {
    Order.DRAIN: "no new rows are started, those in flight are finished and kept; once more to stop at once",
    Order.ABORT: "stopping at once",
}
