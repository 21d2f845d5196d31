"""Display: a job on the terminal. A bar that moves, or, where no person watches, a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from batch.ledger import State
from batch.output.status import Status
from batch.quantities import count, duration

LINE_EVERY_S = 10.0
STARTING = "starting Ray, loading the model"


class Display:
    """What run_job shows a person: `note` for news, `update` again and again. Used as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._is_live = self._console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold cyan]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, facts=STARTING)
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
                for line in summarize(status):
                    self.note(line)
        elif self._is_live:
            is_known = status.state is not State.PENDING
            self._progress.update(
                self._task,
                description=status.name,
                completed=status.rows_done,
                total=status.input_rows if is_known else None,
                facts=", ".join(facts(status)),
            )
        elif is_news or time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self.note(f"{status.name}: {', '.join(facts(status))}")


def facts(status: Status) -> list[str]:
    """Rows, failures, speed and the time left, as far as they are known."""
    if status.state is State.PENDING:
        return [STARTING]
    found = [f"{status.rows_done:,}/{count(status.input_rows, 'row')}"]
    if status.failed_rows:
        found.append(f"{status.failed_rows:,} failed")
    if status.tokens_per_s:
        found.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.reason is not None:
        found.append(f"stopping: {status.reason}")
    elif status.eta_s is not None:
        found.append(f"{duration(status.eta_s)} left")
    return found


def summarize(status: Status) -> list[str]:
    """How the job ended, and what to do next where that is not all."""
    errors = ", ".join(f"{code} {number:,}" for code, number in status.errors.items())
    lines = [f"{status.name} {status.state}" + (f": {status.reason}" if status.reason else "")]
    failed = f", {status.failed_rows:,} failed ({errors})" if status.failed_rows else ""
    pending = f", {status.pending_rows:,} not done" if status.pending_rows else ""
    lines.append(f"  {status.ok_rows:,} of {count(status.input_rows, 'row')} ok{failed}{pending}")
    if status.tokens_per_s:
        speed = f"{status.tokens_per_s:,.0f} tokens/s"
        generated = f"{count(status.generated_tokens, 'token')} generated"
        done = generated if status.generated_tokens else count(status.prompt_tokens, "prompt token")
        lines.append(f"  {done}, {speed}, {duration(status.elapsed_s)} in all")
    lines.append(f"  output: {status.output}")
    if status.pending_rows:
        lines.append("  Run the same command again to continue.")
    return lines
