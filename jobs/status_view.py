"""A job as its output folder tells of it, with or without a cluster, and as the cluster does."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from batch.output.folder import JOB, OutputFolder
from batch.quantities import count, duration
from batch.watch.status import Status
from engine.errors import UserError
from jobs import facts

if TYPE_CHECKING:
    from jobs.submission import Submission

SILENT_S = 60.0  # status.json is written every 10 s at least


def read(output: str) -> str | None:
    """The text of status.json; None where there is none to be read."""
    try:
        content = OutputFolder(output).read(f"{JOB}/status.json")
    except (OSError, UserError):
        return None
    return None if content is None else content.decode()


def has_status(path: str) -> bool:
    return read(path) is not None


def draw(text: str, price: float | None = None) -> str:
    """status.json in words; money with a price: see facts.money."""
    status, updated = Status.from_json(text)
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
    text = read(output)
    if text is None:
        return "?"
    values = json.loads(text)
    return f"{values['rows_done']:,}/{count(values['input_rows'], 'row')}"
