"""Rows that end their worker each time they are tried: they become error rows, and their neighbours are not harmed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun

from moray.batch.output.folder import OutputFolder
from moray.batch.output.verify import verify
from moray.batch.report.report_data import read_report_data
from moray.batch.runtime.driver import run_job
from moray.batch.spec import JobSpec

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

Start = Callable[[JobSpec], MorayRun]

POISON = 77  # a token that only poison rows have: their worker is killed
RAISING = 78  # an exception comes of them
HANGING = 79  # they never come back
# What dies like this for real is a kernel with a bug or a row that wants more memory than there is.
SITE = f"""
import importlib.abc, importlib.util, os, sys

class Poisoner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "moray.engine.runner.model_runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_poison(module):
            execute(module)
            run = module.ModelRunner.run

            def poisoned(self, scheduled, *others):
                tokens = {{token for item in scheduled for token in item.seq.token_ids}}
                if {POISON} in tokens:
                    os.kill(os.getpid(), 9)
                if {RAISING} in tokens:
                    raise RuntimeError("no kernel for this row")
                if {HANGING} in tokens:
                    os.kill(os.getpid(), 19)  # SIGSTOP: no thread of it goes on
                return run(self, scheduled, *others)

            module.ModelRunner.run = poisoned

        spec.loader.exec_module = execute_and_poison
        return spec

sys.meta_path.insert(0, Poisoner())
"""


def make_job(folder: Path, tokens: dict[int, int], **sections: Any) -> JobSpec:
    """tokens: of rows that are to have a special one"""
    prompts = [[100 + i, 50 + i % 7, tokens.get(i, 60)] for i in range(64)]
    write_input(folder / "in/a.parquet", {"ids": prompts})
    sampling = {"max_tokens": 30, "temperature": 1.0, "seed": 3, "ignore_eos": True, "stop_token_ids": []}
    return make_spec(
        folder,
        input={"token_ids": "ids"},
        sampling=sampling,
        engine={"max_num_seqs": 8},
        output={"keep": "none"},
        **sections,
    )


def answers(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["source_row"]: row for row in read_output(folder)}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers that are started from now on heed the special tokens."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fine")
    assert run_job(make_job(folder, {})).exit_code == 0
    return answers(folder)


def check(run: MorayRun, fine: dict[int, dict[str, Any]], bad: dict[int, tuple[str, str]]) -> None:
    """bad: row -> code and message of its error"""
    for number, row in answers(run.folder).items():
        if number in bad:
            assert (row["error"]["code"], row["error"]["message"]) == bad[number], row
        else:
            assert row == fine[number]
    assert verify(str(run.folder / "out")).closes
    deaths = [event for event in run.events() if event["event"] == "actor_lost"]
    lives = [
        process for one in read_report_data(OutputFolder(str(run.folder / "out"))).runs for process in one.processes
    ]
    assert sorted(process.rows for process in lives if process.has_died) == sorted(event["rows"] for event in deaths)
    alone = [event for event in deaths if event["rows"] == 1]
    assert len(alone) == 2 * len(bad) and 1 <= len(deaths) - len(alone) <= 3 + 3 * len(bad), deaths
    assert run.left() == []


@pytest.mark.slow
def test_rows_that_end_their_worker_are_found_and_their_neighbours_unharmed(
    tmp_path: Path, fine: dict[int, dict[str, Any]], poisoned: None, start: Start
) -> None:
    """Three that kill it in one shard, two of them side by side; one that makes the engine raise."""
    run = start(make_job(tmp_path, {17: POISON, 18: POISON, 26: POISON, 40: RAISING}))
    code, output = run.end()
    assert code == 0, output
    assert "60 of 64 rows ok, 4 failed (killed_worker 3, engine_failed 1)" in output
    killed = ("killed_worker", "2 workers died while it was alone in them")
    reason = "RuntimeError: no kernel for this row"
    failed = ("engine_failed", f"2 workers failed while it was alone in them: {reason}")
    check(run, fine, {17: killed, 18: killed, 26: killed, 40: failed})
    assert any("Traceback" in event["message"] for event in run.events() if event["event"] == "log")
    assert {event.get("reason") for event in run.events() if event["event"] == "actor_lost"} == {
        None, f"it failed: {reason}",
    }  # fmt: skip


@pytest.mark.slow
def test_a_row_that_never_comes_back_is_found(
    tmp_path: Path, fine: dict[int, dict[str, Any]], poisoned: None, start: Start
) -> None:
    run = start(make_job(tmp_path, {26: HANGING}, limits={"row_timeout_s": 10}))
    code, output = run.end()
    assert code == 0, output
    (row,) = [row for row in answers(tmp_path).values() if row["error"] is not None]
    assert re.fullmatch(
        r"2 workers hung while it was alone in them: no step came back in 1\d s; limits.row_timeout_s is 10",
        row["error"]["message"],
    )
    check(run, fine, {26: ("row_timeout", row["error"]["message"])})
    assert 3 <= output.count("hangs: no step came back in 1") <= 5, "with others, by halves, twice alone"


@pytest.mark.slow
def test_an_engine_that_always_raises_ends_the_job(tmp_path: Path, poisoned: None, start: Start) -> None:
    run = start(make_job(tmp_path, dict.fromkeys(range(64), RAISING)))
    code, output = run.end()
    assert code == 1
    assert (
        "FAILED: workers failed 11 times with one row alone in them, and none survived: it is the worker, not the rows "
        "(RuntimeError: no kernel for this row)."
    ) in output, output
    assert (run.status()["pending_rows"], run.parts()) == (64, set())
    assert run.left(logs=True) == []
