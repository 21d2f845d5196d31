"""The GPU benchmark without a GPU: every stage in tiny shapes, kernels under the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.setup import Results
from patience import PATIENCE_S
from repository import ROOT

SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
STAGES = [
    "compile",
    *(pytest.param(s, marks=pytest.mark.slow) for s in ("correctness", "ranks", "kernels", "engine", "peers", "batch")),
]


def dry_run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_finds_something_and_no_fault(stage: str, tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--stages", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / f"{stage}.json").read_text())
    assert len(rows) >= {"compile": 1, "batch": 1, "peers": 3, "ranks": 3}.get(stage, 7)
    faults = [row for row in rows if row.get("ok") is False or any(": error" in name for name in row)]
    faults += [row for row in rows if "error" in row and "check" not in row]
    assert not faults
    assert json.loads((tmp_path / "context.json").read_text())["versions"]["torch"]


def test_rows_are_on_disk_as_soon_as_they_are_there(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    for count in range(1, 4):
        results.add({"us": 1.23456 * count, "percent": float("nan"), "op": "linear"})
        found = json.loads(results.path.read_text())
        assert len(found) == count and found[0] == {"us": 1.235, "percent": None, "op": "linear"}


def test_a_stage_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--stages", "kernels,engines")
    assert done.returncode == 2 and "no stage engines; there are compile" in done.stderr
