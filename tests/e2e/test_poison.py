"""Rows that kill their worker each time they are tried: they become error rows, and their neighbours are not harmed."""

from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun

from batch.output.folder import OutputFolder
from batch.report.facts import read_facts
from batch.spec import JobSpec
from batch.verify import verify

POISON = 77  # a token that only poison rows have
# What dies like this for real is a kernel with a bug or a row that wants more memory than there is.
SITE = f"""
import importlib.abc, importlib.util, os, sys

class Poisoner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "engine.model_runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_poison(module):
            execute(module)
            run = module.ModelRunner.run

            def poisoned(self, scheduled, *others):
                if any({POISON} in item.seq.token_ids for item in scheduled):
                    os.kill(os.getpid(), 9)
                return run(self, scheduled, *others)

            module.ModelRunner.run = poisoned

        spec.loader.exec_module = execute_and_poison
        return spec

sys.meta_path.insert(0, Poisoner())
"""


def make_job(folder: Path, poison: set[int], name: str) -> JobSpec:
    prompts = [[100 + i, 50 + i % 7, POISON if i in poison else 60] for i in range(64)]
    write_input(folder / name / "in/a.parquet", {"ids": prompts})
    sampling = {"max_tokens": 30, "temperature": 1.0, "seed": 3, "ignore_eos": True, "stop_token_ids": []}
    return make_spec(
        folder / name,
        input={"token_ids": "ids"},
        sampling=sampling,
        engine={"max_num_seqs": 8},
        output={"keep": "none"},
    )


def answers(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["source_row"]: row for row in read_output(folder)}


def test_poison_rows_are_found_and_their_neighbours_unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in one shard, two of them side by side."""
    poison = {17, 18, 26}
    code, output = MorayRun(tmp_path / "fine", make_job(tmp_path, set(), "fine")).end()
    assert code == 0, output
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    run = MorayRun(tmp_path / "poisoned", make_job(tmp_path, poison, "poisoned"))
    code, output = run.end()
    assert code == 0, output
    assert "61 of 64 rows ok, 3 failed (killed_worker 3)" in output
    fine, ours = answers(tmp_path / "fine"), answers(tmp_path / "poisoned")
    for number, row in ours.items():
        if number in poison:
            assert row["error"]["code"] == "killed_worker", row
            assert row["error"]["message"] == "2 workers died while it was alone in them"
        else:
            assert row == fine[number]
    assert verify(str(tmp_path / "poisoned/out")).closes
    deaths = [event for event in run.events() if event["event"] == "actor_lost"]
    lives = [life for one in read_facts(OutputFolder(str(tmp_path / "poisoned/out"))).runs for life in one.lives]
    assert sorted(life.rows for life in lives if life.has_died) == sorted(event["rows"] for event in deaths)
    alone = [event for event in deaths if event["rows"] == 1]
    assert len(alone) == 2 * len(poison) and 1 <= len(deaths) - len(alone) <= 2, deaths
