"""The worker whose model takes no time runs a whole job, on a real Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S
from repository import ROOT

SCRIPT = """
import sys
from pathlib import Path

import bench_scale

folder = Path(sys.argv[1])
bench_scale.write_rows(folder / "in", 40)
found = bench_scale.run(bench_scale.make_spec(folder, "in", "out"), 40)
assert found["rows_done"] == 40, found
"""


@pytest.mark.slow
def test_a_job_without_a_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}  # for Ray's workers
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=ROOT / "benchmarks"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
