"""Audience: all that follow a run: its job folder, a person, Prometheus."""

import time
from typing import TYPE_CHECKING, Protocol

from batch.faults.reasons import explain
from batch.output.folder import OutputFolder
from batch.watch.status import Reporter, Status
from batch.watch.workers import Workers

if TYPE_CHECKING:  # Ray is imported when its environment is settled: see ray_session
    from batch.watch.metrics import JobMetrics


class Display(Protocol):
    """Where a person follows the job."""

    def note(self, message: str) -> None: ...
    def update(self, status: Status) -> None: ...


class Audience:
    """
    metrics:  set while Ray is there to export them
    """

    def __init__(self, reporter: Reporter, workers: Workers, folder: OutputFolder, display: Display | None) -> None:
        self.metrics: JobMetrics | None = None
        self._reporter = reporter
        self._workers = workers
        self._folder = folder
        self._display = display

    def note(self, message: str) -> None:
        """A line for the person."""
        if self._display is not None:
            self._display.note(message)

    def show(self, status: Status | None = None, *, at_once: bool = False) -> None:
        """How the job is, to everybody; in the folder at most every second or ten, but for `at_once`."""
        status = status or self._reporter.status()
        self._reporter.record_figures()
        self._reporter.write(status, at_once=at_once)
        if self.metrics is not None:
            self.metrics.set(status, self._workers.latest(time.monotonic()), self._workers.totals)
        self.show_person(status)

    def show_person(self, status: Status) -> None:
        """To nobody else: the folder stays as it is."""
        if self._display is not None:
            self._display.update(status)

    def show_end(self) -> Status:
        """The last status, with the last figures and the report."""
        self._reporter.record_figures(at_once=True)
        self._workers.end(time.monotonic())
        status = self._reporter.status()
        ending = {"state": status.state, "reason": status.reason, "pending": status.pending_rows}
        self._reporter.record("ended", **ending, ready_s=round(self._reporter.ready_s, 6))
        self.show(status, at_once=True)
        self.write_report()
        return status

    def write_report(self) -> None:
        """Whatever goes wrong with it, the job is as it is."""
        from batch.report import write_report

        try:
            self.note(f"  report: {write_report(self._folder.path)}")
        except Exception as failure:
            self.note(f"  The report could not be written: {explain(failure)}")
