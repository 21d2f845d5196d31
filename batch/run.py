"""Run: one run of a planned job, from the lease on its folder to its last status."""

import platform
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from secrets import token_hex

from batch.faults.reasons import explain
from batch.forecast.first import FirstForecast
from batch.ledger import Committed, Ended, Ledger, Signalled, State
from batch.output.folder import OutputFolder
from batch.output.job_folder import claim_folder
from batch.output.lease import hold_lease
from batch.output.part import find_committed
from batch.planning.plan import Shard
from batch.planning.planner import PlannedJob
from batch.ray_session import check_address, ray_session
from batch.signals import catch_signals
from batch.supervisor import Supervisor
from batch.watch.audience import Audience, Display
from batch.watch.status import Reporter, Status, read_status
from batch.watch.workers import Workers
from engine.errors import OutputError, UserError


@dataclass(frozen=True)
class JobResult:
    """How a run ended. did_nothing: the job was over before it."""

    status: Status
    did_nothing: bool = False

    @property
    def exit_code(self) -> int:
        return self.status.exit_code


class Run:
    """
    again:  of a retry, the rows to run, by shard
    price:  for the forecast: USD for an hour of a card, or of a worker
    """

    def __init__(
        self,
        job: PlannedJob,
        folder: OutputFolder,
        ledger: Ledger,
        display: Display | None,
        again: Mapping[int, Shard] | None = None,
        price: float | None = None,
    ) -> None:
        self._job = job
        self._is_retry = again is not None
        self._folder = folder
        self._ledger = ledger
        self._id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{token_hex(2)}"
        workers = _workers_of(folder)
        self._reporter = Reporter(
            job.spec.name, self._id, ledger, folder, time.monotonic, workers, is_scoring=job.spec.task == "score"
        )
        self._audience = Audience(self._reporter, workers, folder, display)
        self._forecast = FirstForecast(job, folder, self._audience.note, price)
        self._supervisor = Supervisor(job, ledger, self._reporter, workers, self._audience, self._forecast, again)
        self._is_starting = False  # Ray
        self._failure: BaseException | None = None

    def run(self, address: str | None) -> JobResult:
        """address: of a Ray cluster; None = on this machine. Raises UserError."""
        if self._ledger.state.is_final:
            return self._do_nothing()
        if address is not None:
            check_address(address)
        with hold_lease(self._folder, self._id, self._audience.note):
            status = self._run(address)
        if isinstance(self._failure, UserError):
            raise self._failure
        return JobResult(status)

    def _run(self, address: str | None) -> Status:
        claim_folder(self._folder, self._job.spec, self._job.plan)
        rows, pending = self._ledger.num_rows, self._ledger.pending
        self._reporter.record("started", rows=rows, pending=pending, is_retry=self._is_retry, versions=_versions())
        with catch_signals(self._signalled):
            try:
                draw = None if self._is_retry else self._forecast.start(self._ledger)
                self._audience.show()
                self._is_starting = True
                self._supervisor.read_inbox(0)  # where a signal may be that came before
                with ray_session(address, self._supervisor.inbox.put, lambda: self._ledger.state is State.FAILED):
                    self._is_starting = False
                    if self._ledger.stopping_reason is None:
                        self._supervisor.drive(draw, can_grow=address is not None)
                    else:  # nothing is in flight
                        self._ledger.handle(Ended())
                    return self._finish()  # before Ray is shut down, which may take its time
            except (Exception, KeyboardInterrupt) as failure:
                self._is_starting = False
                self._fail(failure)
                return self._finish()

    def _signalled(self, name: str) -> None:
        """The supervisor's matter. While Ray starts it reads nothing: there a second signal breaks the start off."""
        if not self._is_starting:
            self._supervisor.inbox.put(Signalled(name))
            return
        self._supervisor.handle(Signalled(name))
        if self._supervisor.is_aborting:
            raise KeyboardInterrupt

    def _do_nothing(self) -> JobResult:
        status = self._reporter.status()
        claim_folder(self._folder, self._job.spec, self._job.plan)  # of no rows, or of parts whose _job was deleted
        there = read_status(self._folder)
        if self._is_retry:
            self._audience.note(f"No row failed{_with(status.errors)}: nothing to retry.")
        elif status.pending_rows:
            self._audience.note("More rows have failed already than limits.max_failed_rows allows: nothing is run.")
        else:
            rows = "The only row is" if status.input_rows == 1 else f"All {status.input_rows:,} rows are"
            self._audience.note(f"{rows} done already: nothing to do.")
        if there is None or there[0].state is not status.state:  # a run that was killed when all was done
            self._reporter.write(status, at_once=True)
            self._audience.write_report()
        self._audience.show_person(status)
        return JobResult(status, did_nothing=True)

    def _fail(self, failure: BaseException) -> None:
        """Take it that the pipeline is over, because of this."""
        self._ledger.handle(Ended(explain(failure)))
        self._audience.metrics = None  # Ray may be gone
        if self._ledger.stopping_reason is None:
            self._failure = failure
            self._reporter.record("failed", traceback="".join(traceback.format_exception(failure)))

    def _finish(self) -> Status:
        if self._ledger.state is State.FAILED and not self._is_retry:
            self._count_again()
        return self._audience.show_end()

    def _count_again(self) -> None:
        """A pipeline that breaks off has parts published that it did not come to tell of."""
        with suppress(OSError, OutputError):
            for shard, counts in find_committed(self._folder, self._job.plan, self._ledger.committed).items():
                self._supervisor.handle(Committed(shard, counts))


def _workers_of(folder: OutputFolder) -> Workers:
    """None yet; what earlier runs held counts on."""
    before = read_status(folder)
    return Workers() if before is None else Workers(worker_s=before[0].worker_s, card_s=before[0].card_s)


def _versions() -> dict[str, str]:
    names = ("moray", "ray", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _with(errors: Mapping[str, int]) -> str:
    """Where some failed otherwise than was asked for."""
    return (
        f" like that (there are {', '.join(f'{code} {count:,}' for code, count in errors.items())})" if errors else ""
    )
