"""report: what a job was and how it went, as one HTML file that needs nothing beside it.

Made from the job's files alone: events.py, examples.py and facts.py read, the others draw.
"""

from pathlib import Path

from batch.output.folder import JOB, OutputFolder
from batch.report.facts import read_facts
from batch.report.page import draw_page
from engine.errors import OutputError

REPORT = f"{JOB}/report.html"


def make_report(output: str) -> str:
    """The report of a job's output folder, as HTML. Raises OutputError where it is none."""
    return draw_page(read_facts(OutputFolder(output)))


def write_report(output: str, file: str | None = None) -> str:
    """Write a job's report into its folder, or to a local file; returns where it lies.

    Raises OutputError where the folder is none of a job, or the report cannot be written.
    """
    content = make_report(output).encode(errors="replace")  # events may hold halves of surrogate pairs
    where = file or f"{output.rstrip('/')}/{REPORT}"
    try:
        if file is None:
            OutputFolder(output).write(REPORT, content)
        else:
            Path(file).write_bytes(content)
    except OSError as error:
        raise OutputError(f"{where} cannot be written: {error}. Name another file with --output.") from None
    return where
