"""The specs in jobs/examples are valid."""

from pathlib import Path

import pytest
from repository import ROOT

from moray.batch.plan.planner import plan_job
from moray.batch.spec import load_spec

EXAMPLES = sorted((ROOT / "jobs/examples").glob("*.yaml"))


def test_there_is_one_for_each_kind_of_job() -> None:
    assert [path.stem for path in EXAMPLES] == ["chat", "classify", "evaluate", "extract", "summarise"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_a_spec_and_says_what_it_reads(path: Path) -> None:
    spec = load_spec(path)
    about = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    kept = () if spec.output.keep in ("all", "none") else spec.output.keep
    assert all(column in about for column in (*kept, *spec.sampling.columns.values()))


def test_the_evaluation_can_be_planned_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan_job(load_spec("jobs/examples/evaluate.yaml")).plan.num_rows == 500
