"""Display: a job on the terminal. A bar that moves, or, where no person watches, a line now and then."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from batch.ledger import State
from batch.watch.status import Status
from jobs import facts

LINE_EVERY_S = 10.0
BAR_WIDTH = 40


class Display:
    """What run_job shows a person: `note` for news, `update` again and again. Used as a context manager.

    price: USD for an hour of a GPU, of a worker where there are none; None = no money is shown
    """

    def __init__(self, console: Console | None = None, price: float | None = None) -> None:
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
        self._task = self._progress.add_task("", total=None, rows=facts.STARTING)
        self._next_line_s = 0.0
        self._state: State | None = None

    def __enter__(self) -> "Display":
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
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def update(self, status: Status) -> None:
        """Show where the job is. The first final status shows how it ended."""
        is_news, self._state = status.state != self._state, status.state
        if status.state.is_final:
            self._stop()
            if is_news:
                for line in facts.summary(status, self._price):
                    self.note(line)
        elif self._is_live:
            self._draw(status)
        elif is_news or time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self.note(facts.line(status, self._price))

    def _draw(self, status: Status) -> None:
        rows, *failures = facts.rows(status)
        self._bar.bar_width = max(8, min(BAR_WIDTH, self._console.width - len(status.name) - len(rows) - 6))
        lines = [facts.pace(status), facts.work(status, self._price), failures]
        self._progress.lines = [", ".join(line) for line in lines if line]
        self._progress.update(
            self._task,
            description=status.name,
            completed=status.rows_done,
            total=None if status.state is State.PENDING else status.input_rows,
            rows=rows,
        )


class _Progress(Progress):
    """A bar, and lines below it."""

    lines: Iterable[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in self.lines:
            yield Text(f"  {line}")
