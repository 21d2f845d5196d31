"""The command `moray doctor`: a healthy machine, exit codes, the shape of the JSON, the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doctor_run import ask
from made_jobs import TINY
from patience import PATIENCE_S
from typer.testing import CliRunner

from moray.engine.errors import UserError
from moray.jobs.cli import app
from moray.jobs.doctor.table import CHECKS


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job() -> str:
    Path("in").mkdir()
    pq.write_table(pa.table({"prompt": ["a"] * 40}), "in/1.parquet")
    Path("job.yaml").write_text(f"model: {{path: {TINY}}}\ninput: {{path: in}}\noutput: {{path: out}}\n")
    return "job.yaml"


def moray(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"} | variables
    command = [sys.executable, "-m", "moray.jobs.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


@pytest.mark.slow
def test_a_healthy_machine_has_no_problem() -> None:
    answer = ask()
    assert (answer.problems(), answer.code) == ([], 0)
    assert "same bits" in answer.one("CPU", "rows")["value"]
    without_job = {(check.section, check.name) for check in CHECKS if check.section not in ("Job", "GPU")}
    assert without_job <= answer.findings.keys()


def test_a_job_that_can_run(job: str) -> None:
    answer = ask(job)
    assert (answer.problems(), answer.code) == ([], 0)
    assert "same bits" in answer.one("CPU", "rows")["value"]
    of_stores = {("Job", "credentials"), ("Job", "download")}
    checks = {(check.section, check.name) for check in CHECKS if check.section != "GPU"}
    assert checks - of_stores <= answer.findings.keys()
    assert answer.one("Job", "input")["value"].startswith("40 rows in 1 file, ")
    assert "phimoe" in answer.one("Job", "model")["value"]
    assert "this machine" in answer.one("Job", "model's room")["value"]
    assert answer.one("Job", "output")["value"].startswith(f"out (to be made in {Path.cwd()}): ")
    assert "fit together" in answer.one("Job", "plan")["value"]
    assert not Path("out").exists() and sorted(os.listdir()) == ["in", "job.yaml"]


@pytest.mark.slow
def test_a_job_that_cannot_run(job: str) -> None:
    Path("file").touch()
    answer = ask(job, "--set", "input.prompt=question", "--set", "output.path=file/out", "--set", "model.path=gone")
    assert answer.code == 1
    assert {one["name"]: one["value"] for one in answer.problems()} == {
        "input": "1.parquet: has no column 'question' (input.prompt); known: prompt",
        "model": f"gone does not exist (looked for from {Path.cwd()}).",
        "output": "file/out is a file, or is below one",
    }
    assert all(one["fix"] for one in answer.problems())


@pytest.mark.slow
def test_what_does_not_fit_together(job: str) -> None:
    answer = ask(job, "--set", "sampling.max_tokens=5000", "--set", "engine.kv_cache_memory=900TiB")
    assert {one["name"] for one in answer.problems()} == {"plan", "model's room"}
    assert "sampling.max_tokens: needs 5,001 tokens (prompt 1 + max_tokens 5,000)" in answer.one("Job", "plan")["value"]


@pytest.mark.slow
def test_a_model_alone() -> None:
    answer = ask("--model", str(TINY))
    assert answer.code == 0
    assert answer.one("CPU", "rows")["value"].count("in 5 shapes of linear layers: bfloat16 by ") == 1
    assert ("Job", "output") not in answer.findings


def test_mistakes_in_what_is_given(job: str) -> None:
    for arguments, words in (
        ((job, "--model", "m"), "SPEC names a model already"),
        (("--set", "sampling.n=2"), "give the SPEC too"),
        ((job, "--set", "sampling.n=none"), "sampling.n: must be"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    assert CliRunner().invoke(app, ["doctor", "--fly"]).exit_code == 2
    done = moray("no.yaml")
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "no.yaml: cannot be read: No such file or directory" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_table_and_the_json(job: str) -> None:
    done = moray(job, "--set", "model.path=gone", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found.keys() == {"moray", "verdict", "counts", "findings"} and found["verdict"] == "problem"
    assert found["counts"]["problem"] == 1 and sum(found["counts"].values()) == len(found["findings"])
    assert all(one.keys() == {"section", "name", "verdict", "value", "fix"} for one in found["findings"])
    assert all((one["fix"] is None) == (one["verdict"] == "ok") for one in found["findings"])
    done = moray(job, "--set", "model.path=gone")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "") and max(map(len, lines)) <= 80 and "\x1b" not in done.stdout
    assert [line for line in lines if line in ("CPU", "Memory", "GPU", "Versions", "Ray", "Disk", "Job")] == [
        "CPU", "Memory", "GPU", "Versions", "Ray", "Disk", "Job",
    ]  # fmt: skip
    (place,) = (place for place, line in enumerate(lines) if line.startswith("problem  model "))
    assert "fix" in " ".join(lines[place:]).split()
    assert lines[-1].endswith("1 problem")


def test_nothing_heavy_is_imported_before_the_checks_run_apart() -> None:
    code = """
import sys
from moray.jobs.doctor.table import CHECKS
from moray.jobs.doctor.finding import Subject
from moray.jobs.views import doctor as doctor_view
print([name for name in ("torch", "ray", "pyarrow", "transformers", "numba", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
