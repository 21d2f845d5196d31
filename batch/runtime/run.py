"""JobRun: one run of a planned job, from taking the output folder's lease to writing the last status."""

import platform
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

from moray.batch.format_error import format_error
from moray.batch.ledger import Committed, Ended, SignalReceived, State
from moray.batch.output.job_folder import claim_folder
from moray.batch.output.lease import hold_lease
from moray.batch.output.part import encode_part, find_committed
from moray.batch.output.part_stats import count_part
from moray.batch.plan.provenance import describe_origin
from moray.batch.run_events import RunFailed, RunStarted
from moray.batch.runtime.lost_run import record_restart
from moray.batch.runtime.progress_reporting import Display, ProgressReporter
from moray.batch.runtime.ray_choice import RayChoice, choose_ray
from moray.batch.runtime.ray_session import ray_session
from moray.batch.runtime.ray_watch import RayWatchByParent
from moray.batch.runtime.run_context import RunContext
from moray.batch.runtime.run_forecast import RunForecast
from moray.batch.runtime.signals import catch_signals
from moray.batch.runtime.supervisor import Supervisor
from moray.batch.status.status import Status, read_status
from moray.engine.errors import OutputError, UserError


@dataclass(frozen=True)
class JobResult:
    """States how a run ended.

    status:       the job's last status
    did_nothing:  True where the job was already complete, or had failed for good, before this run
    """

    status: Status
    did_nothing: bool = False

    @property
    def exit_code(self) -> int:
        return self.status.exit_code


class JobRun:
    """Runs a planned job once: holds the lease, connects to Ray, supervises the pipeline and writes the result.

    price:  USD for an hour of a GPU, or of a worker where there are no GPUs; used by the forecast
    """

    def __init__(self, context: RunContext, display: Display | None, price: float | None = None) -> None:
        self._context = context
        self._job = context.job
        self._folder = context.folder
        self._ledger = context.ledger
        self._link = context.link
        self._progress = ProgressReporter(context, display)
        self._reporter = self._progress.reporter
        self._forecast = RunForecast(context, self._progress, price)
        self._supervisor = Supervisor(context, self._progress, self._forecast)
        self._is_starting = False  # True while Ray starts
        self._failure: BaseException | None = None

    def run(self, address: str | None) -> JobResult:
        """Run the job on the Ray cluster that `address` or RAY_ADDRESS names, else on a local Ray of its own.

        Raises UserError where the job cannot be run as the user gave it. A job that fails otherwise has a result with
        the reason.
        """
        if self._ledger.num_rows == 0 and not self._ledger.is_complete:
            self._commit_empty_part()
        if self._ledger.state.is_final:
            return self._finish_unstarted()
        choice = choose_ray(address)
        with hold_lease(self._folder, self._context.name, self._progress.note, is_watched=self._link.is_watched):
            status = self._run(choice)
            with suppress(OSError):  # remove what an actor was writing when it was killed
                self._folder.remove_abandoned()
        if isinstance(self._failure, UserError):
            raise self._failure
        return JobResult(status)

    def _run(self, choice: RayChoice) -> Status:
        """Run the job while this run holds the lease; return its last status."""
        claim_folder(self._folder, self._job.spec, self._job.plan)
        self._report_run()
        self._record_restart()
        self._reporter.record(
            RunStarted(self._ledger.num_rows, self._ledger.pending, self._context.is_retry, _versions())
        )
        with catch_signals(self._on_signal):
            try:
                return self._run_on_ray(choice)
            except (Exception, KeyboardInterrupt) as failure:
                self._is_starting = False
                self._record_failure(failure)
                return self._finish()

    def _run_on_ray(self, choice: RayChoice) -> Status:
        """Start or join Ray, run the pipeline, and return the last status."""
        sample_plan = None if self._context.is_retry else self._forecast.start()
        self._progress.warn(self._job.plan.warnings)
        self._progress.show()
        if choice.remark:
            self._progress.note(choice.remark)
        self._is_starting = True
        self._supervisor.read_inbox(0)  # a signal may be in it already
        watch = RayWatchByParent(self._link)
        session = ray_session(
            choice,
            self._supervisor.inbox.put,
            self._keeps_logs,
            self._link.token,
            watch,
            ends_at_once=lambda: self._supervisor.is_aborting,
        )
        with session, watch.running():
            self._is_starting = False
            if self._ledger.stopping_reason is None:
                self._supervisor.drive(sample_plan, is_cluster=choice.address is not None)
            else:  # nothing is in flight
                self._ledger.handle(Ended())
            return self._finish()  # before Ray is shut down, which may take some time

    def _keeps_logs(self, has_failed: bool) -> bool:
        """Return whether to keep Ray's logs: they may show why the job failed, but not why it was stopped."""
        return self._ledger.state is State.FAILED or (has_failed and self._ledger.stopping_reason is None)

    def _on_signal(self, name: str) -> None:
        """Pass a signal on to the supervisor.

        While Ray starts, the supervisor reads no inbox: the signal is handled here, and the second one breaks off the
        start.
        """
        if not self._is_starting:
            self._supervisor.inbox.put(SignalReceived(name))
            return
        self._supervisor.handle(SignalReceived(name))
        if self._supervisor.is_aborting:
            raise KeyboardInterrupt

    def _commit_empty_part(self) -> None:
        """Publish the only part of a job without rows, so that a reader of the folder finds the job's columns."""
        plan, table = self._job.plan, self._job.input.output_schema.empty_table()
        record = *count_part(table, 0.0, Counter()), describe_origin(self._job, self._context.name)
        with hold_lease(self._folder, self._context.name, self._progress.note):
            claim_folder(self._folder, self._job.spec, plan)
            part = encode_part(table, plan.fingerprint.hexdigest, 0, *record)
            self._folder.publish(plan.part_name(plan.shards[0]), part)
        for event in (Committed(0, record[0]), Ended()):
            self._ledger.handle(event)

    def _finish_unstarted(self) -> JobResult:
        """Return the result of a job that needs no run, after writing what is missing in its folder."""
        status = self._reporter.status()
        # for a job without rows, or whose _job folder was deleted
        claim_folder(self._folder, self._job.spec, self._job.plan)
        self._record_restart()
        self._report_run()
        written = read_status(self._folder)
        if self._context.is_retry:
            self._progress.note(f"No row failed{_format_errors(status.errors)}: nothing to retry.")
        elif status.pending_rows:
            self._progress.note("More rows have failed already than limits.max_failed_rows allows: nothing is run.")
        elif not status.input_rows:
            self._progress.note("The input has no rows: the output is one part without any.")
        else:
            rows = "The only row is" if status.input_rows == 1 else f"All {status.input_rows:,} rows are"
            self._progress.note(f"{rows} done already: nothing to do.")
        if written is None or written[0].state is not status.state:  # an earlier run was killed when all rows were done
            self._reporter.write(status, at_once=True)
            self._progress.write_report()
        self._progress.update_display(status)
        return JobResult(status, did_nothing=True)

    def _record_failure(self, failure: BaseException) -> None:
        """Record the failure and mark the pipeline as ended."""
        self._ledger.handle(Ended(format_error(failure)))
        self._progress.metrics = None  # Ray may be gone
        if self._ledger.stopping_reason is None:
            self._failure = failure
            self._reporter.record(RunFailed("".join(traceback.format_exception(failure))))

    def _finish(self) -> Status:
        if self._ledger.state is State.FAILED and not self._context.is_retry:
            self._recount_committed()
        status = self._progress.finish()
        self._link.report_exit(status.exit_code)
        return status

    def _report_run(self) -> None:
        spec = self._job.spec
        self._link.report_run(
            self._folder.path,
            self._context.name,
            is_retry=self._context.is_retry,
            num_committed=len(self._ledger.committed),
            max_restarts=spec.limits.restarts,
            began_s=self._reporter.began_s,
            spec=spec.to_yaml(),
        )

    def _record_restart(self) -> None:
        if self._link.restart is not None:
            record_restart(self._folder, self._link.restart)

    def _recount_committed(self) -> None:
        """Count the parts that a pipeline published before it broke off but did not report."""
        with suppress(OSError, OutputError):
            for shard, counts in find_committed(self._folder, self._job.plan, self._ledger.committed).items():
                self._supervisor.handle(Committed(shard, counts))


def _versions() -> dict[str, str]:
    names = ("moray", "ray", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _format_errors(errors: Mapping[str, int]) -> str:
    """Format how many rows failed with other codes than those asked for; empty where none did."""
    return (
        f" like that (there are {', '.join(f'{code} {count:,}' for code, count in errors.items())})" if errors else ""
    )
