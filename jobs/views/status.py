"""Show the status of jobs: of one from its output folder, and of submissions as the cluster reports them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import PLAN
from moray.batch.output.lease import Holder, read_holder
from moray.batch.status.status import STATUS, Status, read_status
from moray.batch.units import count, duration
from moray.engine.errors import UserError
from moray.jobs.views import status_text

if TYPE_CHECKING:
    from moray.jobs.clusters.submission import Submission

# Age of a status.json from which its driver counts as dead: six times the longest time between two writes, 10 s.
STALE_STATUS_S = 60.0


def read(output: str) -> tuple[Status, datetime] | None:
    """Return the job's status and when it was written; None where there is none or the folder cannot be read."""
    try:
        return read_status(OutputFolder(output))
    except UserError:
        return None


def read_json(output: str) -> str:
    """Return the text of status.json; "null" where there is none."""
    content = OutputFolder(output).read(STATUS)
    return "null" if content is None else content.decode()


def has_status(path: str) -> bool:
    """Return whether `path` is an output folder with a readable status."""
    return read(path) is not None


def explain_missing_status(output: str) -> str:
    """Return why a folder has no status and what to do. Raises UserError where the folder cannot be read."""
    if OutputFolder(output).read(PLAN) is None:
        return f"{output} is no job's output folder; to find a job by its name, give the cluster's --address"
    return (
        f"{output}/{STATUS} is missing or damaged, so the job's state is unknown. To count its output: "
        f"moray verify {output}. Running the job again writes a new status."
    )


def format_status(status: Status, updated: datetime, price: float | None = None, *, output: str) -> str:
    """Format a status in words.

    updated:  when it was written
    price:    as for status_text.cost; None = no cost is shown
    output:   the folder it was read from, which also shows whether the driver is alive
    """
    if status.state.is_final:
        return "\n".join(status_text.summary(status, price))
    described = status_text.pace(status), status_text.work(status, price), status_text.limits(status)
    lines = [
        f"{status.name} {status.state}: {', '.join(status_text.rows(status))}",
        *(f"  {', '.join(line)}" for line in described if line),
        f"  output: {status.output}",
        *status_text.warnings(status),
    ]
    if silence := explain_silence(output, updated):
        lines.append(f"  {silence}")
    return "\n".join(lines)


def explain_silence(output: str, updated: datetime) -> str:
    """Return why a job with the status RUNNING does not run and what to do; empty where it may well run.

    A driver on this machine is known to be dead; one elsewhere counts as dead STALE_STATUS_S after its last write.
    """
    silent_s = (datetime.now(UTC) - updated).total_seconds()
    holder = _holder(output)
    if holder is not None and holder.is_on_this_host and not holder.is_alive:
        if holder.has_parent:
            return f"The driver has died; process {holder.parent} starts it again."
        return (
            f"The driver (process {holder.pid} on this machine) is gone; last update {duration(silent_s)} ago. "
            "Run the job again to continue."
        )
    if silent_s > STALE_STATUS_S:
        return f"Last update {duration(silent_s)} ago: the job was killed, or hangs. Run it again to continue."
    return ""


def _holder(output: str) -> Holder | None:
    try:
        return read_holder(OutputFolder(output))
    except UserError:
        return None


def format_submission(submission: "Submission") -> str:
    """Format the state of a submission as the cluster reports it."""
    reason = (
        f": {submission.message}" if submission.is_over and submission.exit_code == 1 and submission.message else ""
    )
    return f"{submission.id} {submission.state} on the cluster{reason}"


def submissions_table(submissions: Sequence["Submission"]) -> Table:
    """Render one line a submission, the last one first. The latest one of each output folder shows its rows."""
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
