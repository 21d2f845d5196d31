"""report: what a job was and how it went, as one HTML file that needs nothing beside it.

Made from the job's files alone: events.py, examples.py and facts.py read, the others draw.
"""

from batch.output.folder import JOB, OutputFolder
from batch.report.facts import read_facts
from batch.report.page import draw_page

REPORT = f"{JOB}/report.html"


def make_report(output: str) -> str:
    """The report of a job's output folder, as HTML. Raises OutputError where it is none."""
    return draw_page(read_facts(OutputFolder(output)))


def write_report(folder: OutputFolder) -> str:
    """Put the report into the job's folder; returns where it lies. Raises OutputError as make_report does."""
    folder.write(REPORT, encode(draw_page(read_facts(folder))))
    return f"{folder.path}/{REPORT}"


def encode(html: str) -> bytes:
    return html.encode(errors="replace")  # events may hold halves of surrogate pairs
