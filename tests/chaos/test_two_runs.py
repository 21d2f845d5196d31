"""Two runs of one job at once, against all advice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hold import Hold
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from undisturbed import answers

from moray.batch.output.verify import verify
from moray.batch.spec import JobSpec
from moray.engine.params import SamplingParams

pytestmark = pytest.mark.slow

ROWS = 320  # 20 shards
SAMPLING: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "ignore_eos": True}


def test_whole_files_replace_whole_files(
    tmp_path: Path, hold: Hold, start: Callable[[Path, JobSpec], MorayRun]
) -> None:
    """The second finds no lease of the first, and both do all that they find to do."""
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} sheep, {i % 7} lions" for i in range(ROWS)]})
    spec = make_spec(tmp_path, sampling=SAMPLING, engine={"max_num_seqs": 8})
    hold.at(2, "commit")
    first = start(tmp_path, spec)
    first.wait_for(lambda: len(first.parts()) >= 2)
    second = start(tmp_path, spec)

    def has_begun() -> bool:
        (tmp_path / "out/_job/lease.json").unlink(missing_ok=True)  # the first one writes it every 5 s
        return len(list((tmp_path / "out/_job/events").glob("*"))) == 2

    second.wait_for(has_begun)
    assert first.process.poll() is None
    hold.release()
    for run in (first, second):
        code, output = run.end()
        assert code == 0, output
    assert verify(str(tmp_path / "out")).closes
    found = {("a.parquet", row["source_row"]): row["generated_text"] for row in read_output(tmp_path)}
    assert len(read_output(tmp_path)) == ROWS and found == answers(tmp_path, found, SamplingParams(**SAMPLING))
    assert first.left() == second.left() == []
