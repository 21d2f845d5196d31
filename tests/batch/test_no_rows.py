"""A job whose input has no rows leaves a table without rows, and every command agrees."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from made_jobs import make_spec, write_input

from moray.batch.output.folder import OutputFolder
from moray.batch.output.verify import verify
from moray.batch.plan.planner import plan_job
from moray.batch.report import write_report
from moray.batch.runtime.driver import retry_job, run_job
from moray.batch.status.status import read_status
from moray.jobs.views import status_text as facts
from moray.jobs.views.plan_values import describe


class Notes:
    """A display that records its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def update(self, status: Any) -> None:
        pass


def test_a_job_without_rows(tmp_path: Path) -> None:
    kinds = pa.schema([("prompt", pa.string()), ("id", pa.int8())])
    write_input(tmp_path / "in/a.parquet", kinds.empty_table())
    (tmp_path / "in/notes.txt").write_text("x")
    spec, out = make_spec(tmp_path), tmp_path / "out"
    notes = Notes()
    result = run_job(spec, display=notes)
    assert (result.exit_code, result.status.state, result.status.input_rows) == (0, "SUCCEEDED", 0)
    assert "The input has no rows: the output is one part without any." in notes.lines
    (part,) = out.glob("*.parquet")
    job = plan_job(spec)
    assert part.name == job.plan.part_name(job.plan.shards[0])
    assert pq.read_table(part).schema.remove_metadata() == job.input.output_schema
    written = part.stat().st_mtime_ns

    assert run_job(spec).exit_code == retry_job(spec).exit_code == 0
    found = verify(str(out))
    assert (found.closes, found.parts, found.shards, found.problems) == (True, 1, 1, [])
    assert part.stat().st_mtime_ns == written
    assert "0 rows" in Path(write_report(str(out))).read_text()

    plan = describe(job)
    assert plan["committed"] == {"shards": 1, "rows": 0, "failed_rows": 0}
    warnings = [
        "1 file left out, not named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson: notes.txt",
    ]
    assert plan["warnings"] == warnings
    there = read_status(OutputFolder(str(out)))
    assert there is not None and list(there[0].warnings) == warnings
    assert facts.summary(there[0])[-1:] == [f"  Warning: {line}." for line in warnings]
    assert all(f"Warning: {line}." in (out / "_job/report.html").read_text() for line in warnings)

    part.unlink()
    assert run_job(spec).exit_code == 0 and verify(str(out)).closes
