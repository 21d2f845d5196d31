"""ProgressReporter: publishes a run's progress to the job folder, a person's display and Prometheus."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from moray.batch.format_error import format_error
from moray.batch.output.folder import OutputFolder
from moray.batch.run_events import RunEnded
from moray.batch.runtime.run_context import RunContext
from moray.batch.status.status import Reporter, Status, read_status
from moray.batch.status.workers import Workers

if TYPE_CHECKING:  # Ray is imported only when its environment is set: see ray_session
    from moray.batch.runtime.prometheus import JobMetrics


class Display(Protocol):
    """Shows the job to a person who follows it."""

    def note(self, message: str) -> None: ...
    def update(self, status: Status) -> None: ...


class ProgressReporter:
    """Publishes the progress of a run.

    workers:   the job's workers, which continue the worker time and GPU time of earlier runs
    reporter:  writes the job's status and events
    metrics:   the job's Prometheus metrics; None while there is no Ray to export them
    """

    def __init__(self, context: RunContext, display: Display | None) -> None:
        job, self._folder = context.job, context.folder
        self.workers = _restore_workers(self._folder)
        self.reporter = Reporter(
            job.spec.name,
            context.name,
            context.ledger,
            self._folder,
            time.monotonic,
            self.workers,
            is_scoring=job.spec.is_scoring,
            warnings=job.plan.warnings,
            restart=context.link.restart,
        )
        self.metrics: JobMetrics | None = None
        self._display = display

    def note(self, message: str) -> None:
        """Show the person a line."""
        if self._display is not None:
            self._display.note(message)

    def warn(self, warnings: Iterable[str]) -> None:
        """Show the person warnings, and keep them in the job's status from now on."""
        for warning in warnings:
            if warning not in self.reporter.warnings:
                self.reporter.warnings.append(warning)
            self.note(f"Warning: {warning}.")

    def show(self, status: Status | None = None, *, at_once: bool = False) -> None:
        """Publish the status everywhere.

        It is written to the folder at most every second, or every ten on an object store, unless `at_once` is set.
        """
        status = status or self.reporter.status()
        self.reporter.record_stats()
        self.reporter.write(status, at_once=at_once)
        if self.metrics is not None:
            self.metrics.set(status, self.workers.latest_stats(time.monotonic()), self.workers.totals)
        self.update_display(status)

    def update_display(self, status: Status) -> None:
        """Show the status to the person only; the folder stays as it is."""
        if self._display is not None:
            self._display.update(status)

    def finish(self) -> Status:
        """Publish the last status, the last statistics and the report; return the status."""
        self.reporter.record_stats(at_once=True)
        self.workers.end(time.monotonic())
        status = self.reporter.status()
        self.reporter.record(RunEnded(status.state, status.reason, status.pending_rows, self.reporter.ready_s))
        self.show(status, at_once=True)
        self.write_report()
        return status

    def write_report(self) -> None:
        """Write the report and show where it is; a report that cannot be written does not change the job's result."""
        from moray.batch.report import write_report

        try:
            self.note(f"  report: {write_report(self._folder.path)}")
        except Exception as failure:
            self.note(f"  The report could not be written: {format_error(failure)}")


def _restore_workers(folder: OutputFolder) -> Workers:
    """Return an empty set of workers that continues the worker time and GPU time of earlier runs."""
    last_status = read_status(folder)
    return Workers() if last_status is None else Workers(worker_s=last_status[0].worker_s, gpu_s=last_status[0].card_s)
