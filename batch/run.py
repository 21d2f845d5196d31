"""Run: one run of a planned job, from its first shard to its last status."""

import json
import platform
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from queue import Empty, SimpleQueue
from secrets import token_hex
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from batch.forecast.draw import Draw
from batch.forecast.first import FirstForecast
from batch.ledger import Committed, Ended, Event, Ledger, Order, Signalled, State, TimedOut
from batch.order import order_shards
from batch.output.folder import JOB, OutputFolder
from batch.output.job_folder import claim_folder
from batch.output.lease import hold_lease
from batch.output.part import find_committed
from batch.output.status import Reporter, Status
from batch.plan import Shard
from batch.planner import PlannedJob
from batch.ray_session import ray_session
from batch.signals import catch_signals
from batch.start_watch import StartWatch
from batch.watchdog import Stall, Watchdog
from batch.workers import Workers
from engine.errors import MorayError, UserError

if TYPE_CHECKING:  # Ray is imported when its environment is settled: see ray_session
    from batch.metrics import JobMetrics
    from batch.monitor import News
    from batch.rescue import Rescue
    from batch.resources import Resources
    from batch.stages.side import Setup

TICK_S = 0.5
NEWS_S = 10.0  # the monitor's answer takes milliseconds
ABORT_S = 5.0  # an aborted pipeline that has not ended by then is left behind


class Display(Protocol):
    """Where a person follows the job."""

    def note(self, message: str) -> None: ...
    def update(self, status: Status) -> None: ...


@dataclass(frozen=True)
class JobResult:
    """How a run ended. did_nothing: the job was over before it."""

    status: Status
    did_nothing: bool = False

    @property
    def exit_code(self) -> int:
        return self.status.exit_code


class Run:
    """Events come in through a queue, the ledger takes them, its orders go out through the monitor.

    again:  of a retry, the rows to run, by shard
    """

    def __init__(
        self,
        job: PlannedJob,
        folder: OutputFolder,
        ledger: Ledger,
        display: Display | None,
        again: Mapping[int, Shard] | None = None,
    ) -> None:
        self._job = job
        self._again = again
        self._folder = folder
        self._ledger = ledger
        self._display = display
        self._id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{token_hex(2)}"
        is_scoring = job.spec.task == "score"
        self._workers = _workers_of(folder)
        self._reporter = Reporter(
            job.spec.name, self._id, ledger, folder, time.monotonic, self._workers, is_scoring=is_scoring
        )
        self._metrics: JobMetrics | None = None
        self._inbox: SimpleQueue[Event | Exception | str] = SimpleQueue()  # str: what Ray's daemons report
        self._forecast = FirstForecast(job, folder, self._note)
        self._draw: Draw | None = None
        self._resources: Resources | None = None
        self._order: Order | None = None
        self._start_watch: StartWatch | None = None
        self._stalls: list[Stall] = []
        self._is_draining = False
        self._abandon_at_s = float("inf")
        self._failure: Exception | None = None
        self._final: Status | None = None

    def run(self, address: str | None) -> JobResult:
        if self._ledger.state.is_final:
            return self._do_nothing()
        with hold_lease(self._folder, self._id, self._note):
            return self._run(address)

    def _run(self, address: str | None) -> JobResult:
        claim_folder(self._folder, self._job.spec, self._job.plan)
        is_retry = self._again is not None
        pending = self._ledger.pending
        self._reporter.record(
            "started", rows=self._ledger.num_rows, pending=pending, is_retry=is_retry, versions=_versions()
        )
        with catch_signals(lambda name: self._inbox.put(Signalled(name))) as catch_again:
            try:
                if self._again is None:
                    self._draw = self._forecast.start(self._ledger)
                self._show()
                with ray_session(address, self._inbox.put, lambda: self._ledger.state is State.FAILED):
                    catch_again()  # ray.init has put handlers of its own
                    self._drive(can_grow=address is not None)
                    self._finish()  # before Ray is shut down, which may take its time
            except Exception as failure:
                self._fail(failure)
                self._finish()
        if isinstance(self._failure, UserError):
            raise self._failure
        assert self._final is not None
        return JobResult(self._final)

    def _do_nothing(self) -> JobResult:
        status = self._reporter.status()
        there = self._folder.read(f"{JOB}/status.json")
        if self._again is None:
            self._note(f"All {status.input_rows:,} rows are done already: nothing to do.")
        else:
            self._note(f"No row failed{_with(status.errors)}: nothing to retry.")
        if there is None or json.loads(there)["state"] != status.state:  # a run that was killed when all was done
            self._reporter.write(status, at_once=True)
            self._write_report()
        if self._display is not None:
            self._display.update(status)
        return JobResult(status, did_nothing=True)

    def _drive(self, *, can_grow: bool) -> None:
        """From the first shard to a final state."""
        import ray

        from batch.metrics import JobMetrics
        from batch.monitor import start_monitor
        from batch.pipeline import choose_for_cluster, cluster_nodes
        from batch.rescue import Rescue
        from batch.stages.side import Setup

        self._resources = resources = choose_for_cluster(self._job, can_grow=can_grow)
        self._workers.gpus_each = resources.worker.gpus
        self._metrics = JobMetrics(self._job.spec.name)
        stages = {"prepare": resources.side, "worker": resources.worker, "commit": resources.side}
        self._start_watch = StartWatch(stages, self._job.spec.workers.start_timeout_s, cluster_nodes)
        setup = Setup.of(self._job, self._id, self._draw, merges=self._again is not None)
        monitor = start_monitor(setup.monitor)
        rescue = Rescue(Watchdog(self._job.spec.limits.row_timeout_s), monitor)
        pipeline = Thread(target=self._run_pipeline, args=(setup, resources), name="pipeline", daemon=True)
        try:
            pipeline.start()
            news: Any = monitor.poll.remote(self._order)
            while not self._ledger.state.is_final:
                broken = self._read_inbox()
                if broken is not None:  # Ray's exception has a text at best; the stage itself told the monitor
                    raise ray.get(monitor.poll.remote(self._order), timeout=NEWS_S).failure or broken
                if ray.wait([news], timeout=0)[0]:
                    self._take_news(ray.get(news))
                    news = monitor.poll.remote(self._order)
                    self._rescue(rescue)
                self._check_time()
                self._show()
            if self._ledger.state is not State.FAILED:
                with suppress(ray.exceptions.RayError):  # what came with the last commits is no reason to fail
                    for last in (news, monitor.poll.remote(self._order)):
                        self._take_notes(ray.get(last, timeout=NEWS_S))
        finally:
            if self._order is Order.ABORT or not self._ledger.state.is_final:
                rescue.end_all(self._stalls)
            with suppress(ray.exceptions.RayError):  # a monitor that is gone cannot tell
                for name, fields in ray.get(monitor.experts.remote(), timeout=NEWS_S):
                    self._reporter.record(name, **fields)
            ray.kill(monitor)  # what of the pipeline still runs fails by that
            pipeline.join(ABORT_S)

    def _run_pipeline(self, setup: "Setup", resources: "Resources") -> None:
        """In a thread of its own; what happens there goes into the inbox."""
        from batch.pipeline import run_pipeline

        try:
            plan = self._job.plan
            todo = plan.shards if self._again is None else self._again
            shards = order_shards((todo[index] for index in self._ledger.pending_shards), self._job.input.files)
            for committed in run_pipeline(setup, plan, shards, resources):
                self._inbox.put(committed)
            self._inbox.put(Ended())
        except Exception as failure:
            self._inbox.put(failure)

    def _read_inbox(self) -> Exception | None:
        """Wait for something, a tick at most, and handle all that is there, up to the pipeline's end."""
        item: Event | Exception | str
        timeout_s = TICK_S
        while True:
            try:
                item = self._inbox.get(timeout=timeout_s)
            except Empty:
                return None
            timeout_s = 0.0
            if isinstance(item, Exception):
                return item
            if isinstance(item, str):
                self._reporter.record("ray", report=item)
            else:
                self._handle(item)

    def _take_notes(self, news: "News") -> None:
        self._stalls = news.stalls
        now_s = time.monotonic()
        for name, fields in news.notes:
            self._reporter.record(name, **fields)
            self._workers.take(name, fields, now_s)
            if self._start_watch is not None:
                self._start_watch.take(name, fields)
        for actor, figures in news.figures.items():
            self._workers.hear(actor, figures, now_s)
        if news.sample is not None and self._resources is not None:
            self._forecast.take(news.sample, self._resources)

    def _take_news(self, news: "News") -> None:
        self._take_notes(news)
        events: list[Event] = [*news.lost, *news.progress]
        for event in events:
            self._handle(event)
        if news.admitted is not None:
            self._drain([shard for shard in news.admitted if shard not in self._ledger.committed])

    def _rescue(self, rescue: "Rescue") -> None:
        for stall, what in rescue.check(self._stalls):
            self._reporter.record("worker_hangs", actor=stall.actor, pid=stall.pid, seconds=round(stall.seconds, 1))
            self._note(what[0].upper() + what[1:])

    def _drain(self, in_flight: list[int]) -> None:
        """Once what is in flight has committed the run is over: the shards behind it need not pass through empty."""
        if not self._is_draining:
            self._is_draining = True
            self._reporter.record("draining", shards=in_flight)
        if not in_flight:
            self._handle(Ended())

    def _check_time(self) -> None:
        limit_s = self._job.spec.limits.job_timeout_s
        if limit_s is not None and self._reporter.elapsed_s > limit_s:
            self._handle(TimedOut(limit_s))
        if self._start_watch is not None and (waiting := self._start_watch.check(self._reporter.elapsed_s)):
            self._note(waiting)
        if time.monotonic() > self._abandon_at_s:
            self._handle(Ended())

    def _handle(self, event: Event) -> None:
        if isinstance(event, Committed):
            self._reporter.record("committed", shard=event.shard, ok=event.counts.ok, failed=event.counts.failed)
        for order in self._ledger.handle(event):
            self._order = order
            self._reporter.record(order, reason=self._ledger.stopping_reason)
            self._note(f"{self._ledger.stopping_reason}: {_MEANING[order]}")
            if order is Order.ABORT:
                self._abandon_at_s = time.monotonic() + ABORT_S
            self._show(at_once=True)  # what sent the signal may kill us next

    def _fail(self, failure: Exception) -> None:
        """Take it that the pipeline is over, because of this."""
        self._ledger.handle(Ended(explain(failure)))
        self._metrics = None  # Ray may be gone
        if self._ledger.stopping_reason is None:
            self._failure = failure
            self._reporter.record("failed", traceback="".join(traceback.format_exception(failure)))

    def _finish(self) -> None:
        if self._ledger.state is State.FAILED and self._again is None:
            self._count_again()
        self._reporter.record_figures(at_once=True)
        self._workers.end(time.monotonic())
        self._final = status = self._reporter.status()
        self._reporter.record("ended", state=status.state, reason=status.reason, pending=status.pending_rows)
        self._show(status, at_once=True)
        self._write_report()

    def _write_report(self) -> None:
        """Whatever goes wrong with it, the job is as it is."""
        from batch.report import write_report

        try:
            self._note(f"  report: {write_report(self._folder.path)}")
        except Exception as failure:
            self._note(f"  The report could not be written: {explain(failure)}")

    def _count_again(self) -> None:
        """A pipeline that breaks off has parts published that it did not come to tell of."""
        with suppress(OSError):
            for shard, counts in find_committed(self._folder, self._job.plan, self._ledger.committed).items():
                self._handle(Committed(shard, counts))

    def _show(self, status: Status | None = None, *, at_once: bool = False) -> None:
        status = status or self._reporter.status()
        self._reporter.record_figures()
        self._reporter.write(status, at_once=at_once)
        if self._metrics is not None:
            self._metrics.set(status, self._workers.latest(time.monotonic()), self._workers.totals)
        if self._display is not None:
            self._display.update(status)

    def _note(self, message: str) -> None:
        if self._display is not None:
            self._display.note(message)


def _workers_of(folder: OutputFolder) -> Workers:
    """None yet; what earlier runs held counts on."""
    text = folder.read(f"{JOB}/status.json")
    if text is None:
        return Workers()
    before, _ = Status.from_json(text.decode())
    return Workers(worker_s=before.worker_s, card_s=before.card_s)


def _versions() -> dict[str, str]:
    names = ("moray", "ray", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _with(errors: Mapping[str, int]) -> str:
    """Where some failed otherwise than was asked for."""
    return (
        f" like that (there are {', '.join(f'{code} {count:,}' for code, count in errors.items())})" if errors else ""
    )


_MEANING = {
    Order.DRAIN: "no new rows are started, those in flight are finished and kept; once more to stop at once",
    Order.ABORT: "stopping at once",
}


def explain(failure: Exception) -> str:
    """Why, in a line: our own errors in full, of others the last line that says something."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if isinstance(failure, MorayError) or not lines:
        return str(failure) or type(failure).__name__
    return f"{type(failure).__name__}: {lines[-1]}"
