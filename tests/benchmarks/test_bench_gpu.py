"""The GPU benchmark without a GPU: every stage in tiny shapes, kernels under the interpreter."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_gpu import STAGES
from gpu.checks_kernels import run_checks
from gpu.progress import NO_TIME, Progress, bring, check_same, rows_of
from gpu.setup import Results, Setup
from gpu.table import write_tables
from held_steps import wait_for
from patience import PATIENCE_S
from repository import ROOT

SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
CASES = [
    "compile",
    *(pytest.param(s, marks=pytest.mark.slow) for s in ("correctness", "engine", "kernels", "ranks", "peers", "batch")),
]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]


def dry_run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *arguments), capture_output=True, text=True, timeout=PATIENCE_S, env=ENVIRONMENT)


def start(out: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command(out, *arguments), env=ENVIRONMENT, start_new_session=True)


@pytest.mark.parametrize("stage", CASES)
def test_a_stage_finds_something_and_no_fault(stage: str, tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--stages", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / f"{stage}.json").read_text())
    assert len(rows) >= {"compile": 1, "batch": 1, "peers": 3, "ranks": 3}.get(stage, 7)
    faults = [row for row in rows if row.get("ok") is False or any(": error" in name for name in row)]
    faults += [row for row in rows if "error" in row and "check" not in row]
    assert not faults
    assert json.loads((tmp_path / "context.json").read_text())["versions"]["torch"]
    assert "A dry run" in (tmp_path / "tables.md").read_text() and "nothing about speed" in done.stdout


def test_rows_are_on_disk_as_soon_as_they_are_there(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    for count in range(1, 4):
        results.add({"us": 1.23456 * count, "percent": float("nan"), "op": "linear"})
        found = json.loads(results.path.read_text())
        assert len(found) == count and found[0] == {"us": 1.235, "percent": None, "op": "linear"}


def write(folder: Path, stage: str, *rows: dict[str, Any]) -> None:
    (folder / f"{stage}.json").write_text(json.dumps(rows))


def test_a_stage_is_finished_when_nothing_had_to_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, "kernels", {"op": "linear", "rows": 1, "us": 2.0}, {"op": "linear", "rows": 8, "error": NO_TIME})
    Progress(tmp_path).finish("kernels")
    assert not Progress(tmp_path).is_finished("kernels")
    write(
        tmp_path, "kernels", {"op": "linear", "rows": 1, "us": 2.0}, {"op": "linear", "rows": 8, "error": "no kernel"}
    )
    Progress(tmp_path).finish("kernels")
    assert Progress(tmp_path).is_finished("kernels")
    Progress(tmp_path).restart("kernels")
    assert not Progress(tmp_path).is_finished("kernels") and not (tmp_path / "kernels.json").exists()


def test_programs_are_compiled_again_on_another_machine(tmp_path: Path) -> None:
    Progress(tmp_path).finish("compile")
    assert Progress(tmp_path).is_finished("compile")
    (tmp_path / "progress.json").write_text(json.dumps({"compile": "another boot", "kernels": "another boot"}))
    assert not Progress(tmp_path).is_finished("compile") and Progress(tmp_path).is_finished("kernels")


def test_a_row_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    done = [{"op": "linear", "rows": 1, "us": 2.0}]
    setup = Setup(tmp_path, 0.0, done=done)
    assert setup.find(op="linear", rows=1) == done[0]
    assert setup.find(op="linear", rows=8) is None and setup.find(check="linear") is None
    results = Results(tmp_path / "kernels.json", done)
    results.add({"op": "linear", "rows": 8, "us": 3.0})
    assert [row["rows"] for row in json.loads(results.path.read_text())] == [1, 8]
    checks = [(name, lambda: 0.0, 0.0) for name in ("a", "b", "c")]
    with_time = Setup(tmp_path, time.time() + 60, done=[{"check": "a", "ok": True}])
    assert [row["check"] for row in run_checks(with_time, checks)] == ["b", "c"]
    assert [row["error"] for row in run_checks(setup, checks)] == [NO_TIME] * 3


@pytest.mark.parametrize(
    ("changed", "says"), [({"commit": "b"}, "with commit a, this is b"), ({"dry_run": True}, "dry_run")]
)
def test_rows_of_another_commit_or_machine_stand_in_no_table_together(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    context = {"commit": "a", "card": {"name": "H200"}, "dry_run": False, "versions": {"torch": "1"}}
    assert check_same(tmp_path, context) is None
    (tmp_path / "context.json").write_text(json.dumps(context))
    assert check_same(tmp_path, context) is None
    assert says in str(check_same(tmp_path, context | changed))


def test_results_of_another_machine_are_brought_and_kept(tmp_path: Path) -> None:
    for name in ("before", "now"):
        (tmp_path / name).mkdir()
    write(tmp_path / "before", "engine", {"engine": "moray"})
    write(tmp_path / "before", "kernels", {"op": "linear"})
    write(tmp_path / "now", "kernels", {"op": "norm"})
    bring(tmp_path / "before", tmp_path / "now")
    assert rows_of(tmp_path / "now", "engine") == [{"engine": "moray"}]
    assert rows_of(tmp_path / "now", "kernels") == [{"op": "norm"}]


def test_the_tables_name_what_is_wrong_what_is_missing_and_what_was_published(tmp_path: Path) -> None:
    write(tmp_path, "correctness", {"check": "fine", "ok": True}, {"check": "bad", "ok": False, "error": 2, "limit": 1})
    mixed = {"engine": "moray", "model": "mixtral-8x7b", "weights": "fp8", "kind": "mixed", "num_sequences": 256}
    decode = mixed | {"kind": "decode", "tokens_per_s": 9000.0}
    write(tmp_path, "engine", decode, mixed | {"tokens_per_s": 5123.4, "percent_of_bound": 61.2})
    write(tmp_path, "kernels", {"op": "linear", "rows": 8, "error": NO_TIME})
    context = {"commit": "abc", "card": {"name": "NVIDIA H200"}, "dry_run": False}
    text = write_tables(tmp_path, list(STAGES), context).read_text()
    assert "1 checks are right, 1 wrong" in text and "* WRONG: bad: 2 (limit 1)" in text
    assert re.search(
        r"mixtral-8x7b \| 7,417 \(output, per GPU\) \| 5,123 \| mixed, 256 sequences, fp8 \| .*MLPerf", text
    )
    assert "* kernels: linear" in text and "dry run" not in text
    assert "A dry run" in write_tables(tmp_path, list(STAGES), context | {"dry_run": True}).read_text()


@pytest.mark.slow
def test_a_second_call_goes_on_after_the_last_row(tmp_path: Path) -> None:
    """The first call is ended when some rows are there."""
    first = start(tmp_path, "--stages", "engine")
    wait_for(lambda: len(rows_of(tmp_path, "engine")) >= 3)
    first.terminate()
    assert first.wait(PATIENCE_S) == 124
    before = rows_of(tmp_path, "engine")
    done = dry_run(tmp_path, "--stages", "engine")
    assert done.returncode == 0, done.stdout + done.stderr
    after = rows_of(tmp_path, "engine")
    assert after[: len(before)] == before and len(after) > len(before)
    keys = [str({name: row.get(name) for name in ("engine", "model", "weights", "kind")}) for row in after]
    assert len(set(keys)) == len(keys), "nothing was measured twice"
    again = dry_run(tmp_path, "--stages", "engine")
    assert again.returncode == 0 and "engine: at most" not in again.stdout


def test_a_stage_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--stages", "kernels,engines")
    assert done.returncode == 2 and "no stage engines; there are compile" in done.stderr
