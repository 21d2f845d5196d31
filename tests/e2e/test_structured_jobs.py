"""Jobs whose answers obey a schema or a choice: on Ray, in the stages alone, disturbed and undisturbed."""

import json
import math
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job_metrics
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hold import Hold
from made_jobs import TINY, make_spec, read_output, write_input
from moray_run import MorayRun
from repository import ROOT
from stages_alone import run_alone
from watcher import Watcher

from moray.batch.output.verify import verify
from moray.batch.runtime.driver import run_job
from moray.batch.spec import JobSpec, load_spec
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.jobs.views.answers import read_answers

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["sum", "word"]},
        "text": {"type": "string", "maxLength": 6},
        "note": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        "digits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["kind", "text", "note", "digits"],
}
TYPE = "struct<kind: string, text: string, note: string, digits: list<element: int64>>"


ROWS = 128  # of the job that is disturbed


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), EngineConfig(dtype="float32", device="cpu", max_num_seqs=16, kv_cache_memory=2**24))


def make_job(folder: Path, num_rows: int, **sections: Any) -> JobSpec:
    """Sampled JSON, with two samples a row."""
    prompts = [f"{i} sheep, {i % 7} lions:" for i in range(num_rows)]
    write_input(folder / "in/a.parquet", {"prompt": prompts}, row_group_size=50)
    sampling = {"max_tokens": 80, "temperature": 0.8, "seed": 11, "n": 2, "structured": {"json_schema": SCHEMA}}
    return make_spec(
        folder,
        model={"dtype": "float32"},
        sampling=sampling | sections.pop("sampling", {}),
        output={"parse": True} | sections.pop("output", {}),
        engine={"max_num_seqs": 16},
        **sections,
    )


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Each text that ended is JSON of the schema, and parsed has its values."""
    for row in rows:
        if row["finish_reason"] == "length":
            assert row["parsed"] is None
            continue
        value = json.loads(row["generated_text"])
        assert list(value) == list(SCHEMA["properties"]) and row["parsed"] == value
        assert value["kind"] in ("sum", "word") and len(value["text"]) <= 6 and len(value["digits"]) <= 3


def test_answers_obey_their_schema_and_become_columns(tmp_path: Path, engine: Engine) -> None:
    out = run_alone(make_job(tmp_path, 24), engine)
    rows = read_output(tmp_path)
    check_rows(rows)
    assert sum(row["finish_reason"] == "stop" for row in rows) > 40
    assert len({row["generated_text"] for row in rows}) > 40, "sampled, not all alike"
    path, *_ = out.glob("*.parquet")
    assert str(pq.read_schema(path).field("parsed").type).replace("item:", "element:") == TYPE
    assert verify(str(out)).closes
    texts = pd.read_parquet(path).set_index(["source_row", "sample"])
    fields = pl.read_parquet(path).unnest("parsed").filter(pl.col("finish_reason") == "stop")
    for row in fields.iter_rows(named=True):
        assert row["digits"] == json.loads(texts.loc[(row["source_row"], row["sample"]), "generated_text"])["digits"]
    _damage_parsed(path)
    assert [problem.partition(": ")[2] for problem in verify(str(out)).problems] == [
        "its column parsed is not what generated_text says"
    ]


def _damage_parsed(path: Path) -> None:
    """Write a part again with what was parsed of its first two samples exchanged."""
    table, metadata = pq.read_table(path), pq.read_metadata(path).metadata
    index = table.schema.get_field_index("parsed")
    parsed = table["parsed"].take([1, 0, *range(2, table.num_rows)])
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.set_column(index, table.schema.field(index), parsed))
        writer.add_key_value_metadata({"moray": metadata[b"moray"].decode()})


def test_what_max_tokens_cuts_is_counted(tmp_path: Path, engine: Engine) -> None:
    out = run_alone(make_job(tmp_path, 8, sampling={"max_tokens": 12}), engine)
    rows = read_output(tmp_path)
    assert {(row["finish_reason"], row["parsed"]) for row in rows} == {("length", None)}
    records = [json.loads(pq.read_metadata(path).metadata[b"moray"]) for path in out.glob("*.parquet")]
    assert sum(record["counts"]["cut"] for record in records) == 8, "rows, not samples"
    assert verify(str(out)).closes


def test_the_example_chooses_right(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a part of `moray demo structured`: each row has its own choices."""
    monkeypatch.chdir(ROOT)
    overrides = [f"output.path={tmp_path}/out", "input.path=examples/choices/choices-1.parquet", "model.dtype=float32"]
    spec = load_spec("examples/structured.yaml", overrides)
    run_alone(spec, engine)
    answers = read_answers(spec)
    assert (answers.num_known, answers.num_failed) == (67, 1) and answers.num_right >= 65
    for row in read_output(tmp_path):
        assert row["error"] is not None or row["generated_text"].strip() in [text.strip() for text in row["choices"]]


def test_classes_have_the_probabilities_of_scores(tmp_path: Path, engine: Engine) -> None:
    countries = {"Japan": "Tokyo", "Italy": "Rome", "France": "Paris", "Egypt": "Cairo"}
    prompts = [f"The capital of {country} is " for country in countries]
    choices = list(countries.values())
    columns = {"prompt": [*prompts, None], "choices": [choices] * 5, "logprob": [0.5] * 5}
    for name in ("classify", "score"):
        write_input(tmp_path / name / "in/a.parquet", columns)
    model = {"dtype": "float32"}
    sampling = {"structured": {"choice": choices}}
    classify = make_spec(tmp_path / "classify", task="classify", model=model, sampling=sampling)
    score = make_spec(
        tmp_path / "score",
        task="score",
        model=model,
        input={"continuation": "choices"},
        output={"keep": ["choices"]},
    )
    outs = [run_alone(spec, engine) for spec in (classify, score)]
    assert all(verify(str(out)).closes for out in outs)
    classes, scored = (read_output(tmp_path / name) for name in ("classify", "score"))
    logprobs: dict[int, list[float]] = defaultdict(list)
    for row in scored[:-1]:
        logprobs[row["source_row"]].append(row["logprob"])
    for row in classes[:-1]:
        weights = [math.exp(logprob - max(logprobs[row["source_row"]])) for logprob in logprobs[row["source_row"]]]
        expected = [weight / math.fsum(weights) for weight in weights]
        assert list(row["probabilities"].values()) == expected, "bit by bit"
        assert list(row["probabilities"]) == choices and row["choice"] == choices[expected.index(max(expected))]
        assert row["logprob"] == 0.5, "a kept column"
    assert sum(row["choice"] == choices[row["source_row"]] for row in classes[:-1]) >= 3
    assert classes[-1]["error"] == scored[-1]["error"] and classes[-1]["probabilities"] is None
    counts = [
        json.loads(pq.read_metadata(path).metadata[b"moray"])["counts"]
        for out in outs
        for path in out.glob("*.parquet")
    ]
    assert counts[0]["prompt_tokens"] == counts[1]["prompt_tokens"], "the same work"


def test_an_engine_of_another_size_answers_the_same(tmp_path: Path, engine: Engine) -> None:
    other = Engine(str(TINY), EngineConfig(dtype="float32", device="cpu", max_num_seqs=5, kv_cache_memory=2**20))
    found = []
    for name, one in (("a", engine), ("b", other)):
        run_alone(make_job(tmp_path / name, 24), one)
        found.append(read_output(tmp_path / name))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.usefixtures("one_cpu")
def test_a_whole_job(tmp_path: Path) -> None:
    spec = make_job(tmp_path, 40, name="cut", sampling={"max_tokens": 40})
    result = run_job(spec, display=Watcher())
    rows = read_output(tmp_path)
    check_rows(rows)
    cut = len({row["source_row"] for row in rows if row["finish_reason"] == "length"})
    status = json.loads((tmp_path / "out/_job/status.json").read_text())
    assert (result.exit_code, status["ok_rows"], status["cut_rows"]) == (0, 40, cut) and cut
    assert verify(str(tmp_path / "out")).closes
    job_metrics.wait_for(spec.name, {("cut_rows",): cut})
    (path, *_) = (tmp_path / "out").glob("*.parquet")
    record = json.loads(pq.read_metadata(path).metadata[b"moray"])
    assert record["llguidance"] and json.loads(record["spec"]["sampling"]["structured"]["json_schema"]) == SCHEMA
    report = (tmp_path / "out/_job/report.html").read_text()
    assert f"{cut} rows: structured output cut by max_tokens" in report


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> list[dict[str, Any]]:
    """The rows of a job in the stages alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_alone(make_job(folder, ROWS), engine)
    return read_output(folder)


@pytest.mark.slow
@pytest.mark.parametrize("output", [{"token_ids": True}, {"token_ids": True, "logprobs": 2}])  # with forced tokens, not
def test_two_workers_at_once_answer_the_same(
    tmp_path: Path, hold: Hold, start: Callable[..., MorayRun], engine: Engine, output: dict[str, Any]
) -> None:
    """Hold each worker at its first rows until the other has some too."""
    hold.at(0, "worker")
    run = start(make_job(tmp_path, ROWS, output=output, workers={"min": 2, "max": 2, "cpus": 0.5}))
    run.wait_for(lambda: len(waiting := hold.waiting("worker")) == 2 and sorted(waiting) == sorted(run.pids("worker")))
    hold.release()
    code, printed = run.end()
    assert code == 0, printed
    run_alone(make_job(tmp_path / "one", ROWS, output=output), engine)
    rows = read_output(tmp_path)
    check_rows(rows)
    assert rows == read_output(tmp_path / "one")
    assert len(rows) == 2 * ROWS and verify(str(tmp_path / "out")).closes


@pytest.mark.slow
@pytest.mark.alone
def test_killed_and_continued_it_answers_the_same(
    tmp_path: Path, hold: Hold, start: Callable[..., MorayRun], undisturbed: list[dict[str, Any]]
) -> None:
    """Kill the worker in mid-job, then stop the job; the next run may use two workers."""
    hold.at(3, "worker")  # or it would take on all shards
    run = start(make_job(tmp_path, ROWS))
    hold.at_parts(run)
    os.kill(run.pids("worker")[0], signal.SIGKILL)
    hold.at_parts(run)
    run.process.send_signal(signal.SIGINT)
    run.wait_for(lambda: any(event["event"] == "draining" for event in run.events()))
    hold.release()
    code, output = run.end()
    assert code == 128 + signal.SIGINT, output
    parts = run.parts()
    second = start(make_job(tmp_path, ROWS, workers={"max": 2}))
    code, output = second.end()
    assert (code, second.status()["state"]) == (0, "SUCCEEDED"), output
    assert parts < second.parts() and verify(str(tmp_path / "out")).closes
    assert read_output(tmp_path) == undisturbed
