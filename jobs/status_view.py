"""A job as its output folder tells of it, with or without a cluster, and as the cluster does."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from batch.ledger import State
from batch.output.folder import JOB, OutputFolder
from batch.output.status import Status
from batch.quantities import count, duration
from engine.errors import UserError
from jobs.display import facts, summarize

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


def draw(text: str) -> str:
    """status.json in words."""
    values: dict[str, Any] = json.loads(text)
    updated = datetime.fromisoformat(values.pop("updated_at"))
    status = Status(**values | {"state": State(values["state"])})
    if status.state.is_final:
        return "\n".join(summarize(status))
    silent_s = (datetime.now(UTC) - updated).total_seconds()
    lines = [f"{status.name} {status.state}: {', '.join(facts(status))}", f"  output: {status.output}"]
    if silent_s > SILENT_S:
        lines.append(f"  Last heard of {duration(silent_s)} ago: it was killed, or hangs. Run it again to continue.")
    return "\n".join(lines)


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
