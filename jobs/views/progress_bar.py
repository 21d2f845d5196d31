"""ProgressDisplay shows a job's progress: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from moray.batch.ledger import State
from moray.batch.status.status import Status
from moray.jobs.views import status_text

LINE_EVERY_S = 10.0  # between two lines where the output is no terminal
BAR_WIDTH = 40  # characters, at most


class ProgressDisplay:
    """Shows messages (`note`) and the current status (`update`) of a job. Use it as a context manager.

    price:     USD per GPU-hour, or per worker-hour where there are no GPUs; None = no cost is shown
    starting:  what the bar says before the first status
    """

    def __init__(
        self, console: Console | None = None, price: float | None = None, starting: str = status_text.STARTING
    ) -> None:
        self._console = console or Console()
        self._price = price
        self._is_live = self._console.is_terminal
        self._bar = BarColumn()
        self._progress = _Progress(
            SpinnerColumn(),
            TextColumn("[bold cyan]{task.description}"),
            self._bar,
            TextColumn("{task.fields[rows]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, rows=starting)
        self._next_line_s = 0.0
        self._state: State | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self._is_live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._is_live:
            self._progress.stop()

    def note(self, message: str) -> None:
        """Print a message above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def update(self, status: Status) -> None:
        """Show the status. The first final one is shown as the job's summary."""
        is_new_state, self._state = status.state != self._state, status.state
        if status.state.is_final:
            self._stop()
            if is_new_state:
                for line in status_text.summary(status, self._price):
                    self.note(line)
        elif self._is_live:
            self._update_bar(status)
        elif is_new_state or time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self.note(status_text.line(status, self._price))

    def _update_bar(self, status: Status) -> None:
        rows, *failures = status_text.rows(status)
        self._bar.bar_width = max(8, min(BAR_WIDTH, self._console.width - len(status.name) - len(rows) - 6))
        lines = [status_text.pace(status), status_text.work(status, self._price), failures]
        self._progress.lines = [", ".join(line) for line in lines if line]
        self._progress.update(
            self._task,
            description=status.name,
            completed=status.rows_done,
            total=None if status.state is State.PENDING else status.input_rows,
            rows=rows,
        )


class _Progress(Progress):
    """Renders a bar with lines below it."""

    lines: Iterable[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in self.lines:
            yield Text(f"  {line}")
