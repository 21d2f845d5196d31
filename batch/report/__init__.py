"""Make the report of a job: what ran and how it went, as one self-contained HTML file.

It is made from the job's files alone: events.py, examples.py and report_data.py read them, the other modules render.
"""

from pathlib import Path

from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.report.page import render_page
from moray.batch.report.report_data import read_report_data
from moray.engine.errors import OutputError

REPORT = f"{JOB}/report.html"


def make_report(output: str) -> str:
    """Return the report of a job's output folder as HTML. Raises OutputError where it is no job's output folder."""
    return render_page(read_report_data(OutputFolder(output)))


def write_report(output: str, file: str | None = None) -> str:
    """Write a job's report into its folder, or to a local file, and return its path.

    Raises OutputError where the folder is no job's output folder, or the report cannot be written.
    """
    content = make_report(output).encode(errors="replace")  # events may hold lone surrogates, which UTF-8 cannot encode
    path = file or f"{output.rstrip('/')}/{REPORT}"
    try:
        if file is None:
            OutputFolder(output).write(REPORT, content)
        else:
            Path(file).write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Name another file with --output.") from None
    return path
