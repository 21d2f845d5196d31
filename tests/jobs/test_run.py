"""`moray run` and `moray demo` as a user types them, with the model of examples/ on a Ray of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_S
from repository import EXAMPLES

SPEC = f"""\
name: sums
model: {{path: {EXAMPLES}/tiny-phimoe}}
input: {{path: in}}
sampling: {{max_tokens: 8}}
output: {{path: out}}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("job.yaml").write_text(SPEC)


def moray(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    command = [Path(sys.executable).with_name("moray"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


@pytest.mark.slow
def test_run_then_run_again_then_change_the_spec() -> None:
    pq.write_table(pa.table({"prompt": [f"{i} + 3 =" for i in range(20)] + [None]}), "in/1.parquet")
    first = moray("run", "job.yaml", "--set", "limits.max_failed_rows=1")
    assert first.returncode == 0, first.stderr
    assert "sums SUCCEEDED\n  20 of 21 rows ok, 1 failed (null_input 1)\n" in first.stdout
    assert first.stdout.endswith("  output: out\n  report: out/_job/report.html\n")
    rows = pa.concat_tables(pq.read_table(path) for path in sorted(Path("out").glob("part-*.parquet")))
    assert rows["prompt"].to_pylist() == [f"{i} + 3 =" for i in range(20)] + [None]
    assert rows["error"].is_null().to_pylist() == [True] * 20 + [False]

    forecast = json.loads(Path("out/_job/forecast.json").read_text())
    status = json.loads(Path("out/_job/status.json").read_text())
    assert forecast["prompt_tokens"]["expected"] == forecast["prompt_tokens"]["high"] == status["prompt_tokens"] > 0
    assert forecast["error_rows"] == status["errors"] == {"null_input": 1}
    assert forecast["generated_tokens"] == {"expected": None, "low": 0, "high": 20 * 8}
    assert first.stdout.startswith("sums: 21 rows in 1 file, 2 shards, at most 168 tokens to generate\n")
    assert f"sums: {status['prompt_tokens']} prompt tokens, 1 row will fail (null_input 1)\n" in first.stdout

    parts = {path: path.stat().st_mtime_ns for path in Path("out").glob("part-*.parquet")}
    again = moray("run", "job.yaml")
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("part-*.parquet")} == parts

    plan = moray("plan", "job.yaml")
    assert "Done     all 21 rows (1 row with an error); a run would do nothing" in plan.stdout
    assert f"at most 168 tokens to generate, {status['generated_tokens']} expected " in plan.stdout

    verified = moray("verify", "out")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "out is complete\n  21 rows in = 20 ok + 1 failed (null_input 1)\n" in verified.stdout
    Path("out/_job/report.html").unlink()
    assert moray("report", "out").stdout == "out/_job/report.html\n"
    assert moray("report", "out", "--output", "r.html").stdout == "r.html\n"
    assert Path("r.html").read_bytes() == Path("out/_job/report.html").read_bytes()
    missing = moray("report", "in")
    assert missing.returncode == 2 and "in is not the output folder of a job" in missing.stderr

    min(parts).unlink()
    verified = moray("verify", "out", "--json")
    assert verified.returncode == 1 and json.loads(verified.stdout)["pending_rows"] == 16
    over = moray("run", "job.yaml", "--set", "limits.max_failed_rows=0")
    assert (over.returncode, over.stderr) == (1, "")
    assert over.stdout.startswith(
        "More rows have failed already than limits.max_failed_rows allows: nothing is run.\n"
        "  report: out/_job/report.html\n"
        "sums FAILED: 1 row failed; limits.max_failed_rows is 0\n"
    )
    assert over.stdout.endswith("  Raise limits.max_failed_rows, and run it again to continue.\n")
    assert json.loads(Path("out/_job/status.json").read_text())["state"] == "FAILED"
    assert not Path("out/_job/lease.json").exists()
    assert moray("verify", "in").returncode == 2

    changed = moray("run", "job.yaml", "--set", "sampling.temperature=0.5")
    assert (changed.returncode, changed.stdout) == (2, "")
    assert "    sampling.temperature: 0.0 -> 0.5\n" in changed.stderr


@pytest.mark.slow
def test_retry_runs_what_failed_and_nothing_else() -> None:
    prompts = [f"{i} + 3 =" + (" 1 + 1 = 2, 2 + 2 = 4," if i in (3, 4, 11) else "") for i in range(40)] + [None]
    pq.write_table(pa.table({"prompt": prompts}), "in/1.parquet")
    small_cache = ("--set", "engine.kv_cache_memory=16384", "--set", "engine.max_num_seqs=2")
    assert moray("run", "job.yaml", *small_cache).returncode == 0
    before = json.loads(moray("verify", "out", "--json").stdout)
    assert before["closes"] and before["errors"] == {"no_cache_room": 3, "null_input": 1}
    parts = {path: path.stat().st_mtime_ns for path in Path("out").glob("part-*.parquet")}
    with_failures = {
        path for path in parts if pq.read_table(path)["error"].null_count < pq.read_metadata(path).num_rows
    }
    assert 0 < len(with_failures) < len(parts)

    nothing = moray("retry", "job.yaml", "--code", "row_timeout")
    assert nothing.returncode == 0 and "nothing to retry" in nothing.stdout and "no_cache_room" in nothing.stdout
    result = moray("retry", "job.yaml", "--code", "no_cache_room")
    assert result.returncode == 0, result.stderr
    assert "40 of 41 rows ok, 1 failed (null_input 1)" in result.stdout
    written = {path for path in parts if path.stat().st_mtime_ns != parts[path]}
    assert len(written) == 1 and written < with_failures
    after = json.loads(moray("verify", "out", "--json").stdout)
    assert after["closes"] and after["errors"] == {"null_input": 1}

    next(iter(parts)).unlink()
    unfinished = moray("retry", "job.yaml")
    assert unfinished.returncode == 2 and "retry is for jobs that are" in unfinished.stderr


@pytest.mark.slow
def test_a_job_that_was_retried_is_as_if_nothing_had_failed() -> None:
    prompts = [f"{i} + 3 =" + (" 1 + 1 = 2, 2 + 2 = 4," if i in (3, 4, 11) else "") for i in range(40)]
    pq.write_table(pa.table({"prompt": prompts}), "in/1.parquet")
    small_cache = ("--set", "engine.kv_cache_memory=16384", "--set", "engine.max_num_seqs=2")
    assert moray("run", "job.yaml", *small_cache).returncode == 0
    assert json.loads(moray("verify", "out", "--json").stdout)["errors"] == {"no_cache_room": 3}
    assert moray("retry", "job.yaml").returncode == 0
    assert moray("run", "job.yaml", "--set", "output.path=whole").returncode == 0
    retried, whole = (
        pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("part-*.parquet")))
        for folder in ("out", "whole")
    )
    assert retried.equals(whole)


@pytest.mark.slow
def test_a_job_of_which_every_row_fails() -> None:
    pq.write_table(pa.table({"prompt": pa.nulls(3, pa.string())}), "in/1.parquet")
    result = moray("run", "job.yaml")
    assert result.returncode == 1, result.stderr
    assert "sums FAILED" in result.stdout


@pytest.mark.slow
def test_the_demo_from_another_folder(tmp_path: Path) -> None:
    result = moray(
        "demo", "--set", f"output.path={tmp_path}/demo", "--set", "input.path=examples/prompts/prompts-0.parquet"
    )
    assert result.returncode == 0, result.stderr
    assert "demo SUCCEEDED" in result.stdout
    assert re.search(r" right *$", result.stdout, re.MULTILINE)
    share = re.search(r"(\d+) of 100 answers are right", result.stdout)
    assert share is not None and int(share[1]) >= 95
    assert "1 row with an error" in result.stdout
    assert f"All answers: {tmp_path}/demo/part-*.parquet" in result.stdout
