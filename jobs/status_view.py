"""A job as its output folder tells of it, with or without a cluster, and as the cluster does."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from batch.output.folder import OutputFolder
from batch.output.job_folder import PLAN
from batch.quantities import count, duration
from batch.watch.status import STATUS, Status, read_status
from engine.errors import UserError
from jobs import facts

if TYPE_CHECKING:
    from jobs.submission import Submission

SILENT_S = 60.0  # status.json is written every 10 s at least


def read(output: str) -> tuple[Status, datetime] | None:
    """As read_status; None too where nothing can be read there."""
    try:
        return read_status(OutputFolder(output))
    except UserError:
        return None


def read_json(output: str) -> str:
    """status.json as it is."""
    content = OutputFolder(output).read(STATUS)
    return "null" if content is None else content.decode()


def has_status(path: str) -> bool:
    return read(path) is not None


def explain_none(output: str) -> str:
    """Why the folder tells nothing, and what to do. Raises UserError where it is out of reach."""
    if OutputFolder(output).read(PLAN) is None:
        return f"{output} is no job's output folder; to find a job by its name, give the cluster's --address"
    return (
        f"{output}/{STATUS} is missing or damaged, so it is not known how the job is. What is there is counted by: "
        f"moray verify {output}; running the job again writes a new one."
    )


def draw(status: Status, updated: datetime, price: float | None = None) -> str:
    """status.json in words; money with a price: see facts.money."""
    if status.state.is_final:
        return "\n".join(facts.summary(status, price))
    lines = [
        f"{status.name} {status.state}: {', '.join(facts.rows(status))}",
        *(f"  {', '.join(line)}" for line in (facts.pace(status), facts.work(status, price)) if line),
        f"  output: {status.output}",
    ]
    if silence_s(updated) > SILENT_S:
        lines.append(f"  {explain_silence(updated)}")
    return "\n".join(lines)


def silence_s(updated: datetime) -> float:
    return (datetime.now(UTC) - updated).total_seconds()


def explain_silence(updated: datetime) -> str:
    return f"Last heard of {duration(silence_s(updated))} ago: it was killed, or hangs. Run it again to continue."


def draw_submission(submission: "Submission") -> str:
    """The cluster's word."""
    reason = (
        f": {submission.message}" if submission.is_over and submission.exit_code == 1 and submission.message else ""
    )
    return f"{submission.id} {submission.state} on the cluster{reason}"


def draw_list(submissions: Sequence["Submission"]) -> Table:
    """One line a submission, the last one first; rows of the latest one of each job."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("Submission", "State", "Rows", "Started (UTC)", "Output"):
        table.add_column(header, overflow="fold", no_wrap=header == "Submission")
    seen: set[str] = set()
    for one in reversed(submissions):
        rows = "" if one.output in seen else _rows(one.output)
        seen.add(one.output)
        started = f"{datetime.fromtimestamp(one.started_s, UTC):%Y-%m-%d %H:%M}"
        table.add_row(*map(Text, (one.id, str(one.state), rows, started, one.output)))
    return table


def _rows(output: str) -> str:
    found = read(output)
    return "?" if found is None else f"{found[0].rows_done:,}/{count(found[0].input_rows, 'row')}"
