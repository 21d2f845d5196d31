"""Whole jobs on a Ray with a single CPU: every kind of input, every kind of bad row, exact accounting."""

import json
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_alone import answers
from made_jobs import TINY, damage, make_spec, read_output, write_input
from watcher import Watcher

from moray.batch.forecast.speed import speed_of_earlier_run
from moray.batch.ledger import State
from moray.batch.output.folder import OutputFolder
from moray.batch.output.verify import verify
from moray.batch.report.comparison import tokens_per_s
from moray.batch.report.report_data import read_report_data
from moray.batch.runtime.driver import JobResult, run_job
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.status.restart import Restart
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError, OutputError
from moray.engine.params import SamplingParams

pytestmark = [pytest.mark.usefixtures("one_cpu"), pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]


def accounting(folder: Path) -> dict[str, Any]:
    """status.json, once it is known to add up."""
    status: dict[str, Any] = json.loads((folder / "out/_job/status.json").read_text())
    assert status["input_rows"] == status["ok_rows"] + status["failed_rows"] + status["pending_rows"]
    return status


def events(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "out/_job/events").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def greedy(prompts: list[str], max_tokens: int) -> list[str]:
    """Return the text that an engine alone answers to each prompt."""
    engine = Engine(str(TINY), EngineConfig(max_num_seqs=1))
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    completions = answers(engine, [tokenizer.encode_prompt(p) for p in prompts], SamplingParams(max_tokens=max_tokens))
    return [tokenizer.decode(completion.token_ids) for completion in completions]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> tuple[Path, JobResult, Any]:
    """A job over Parquet of every layout, with bad rows of many kinds, that has run."""
    folder = tmp_path_factory.mktemp("mixed")
    first = [f"max({i}, {i + 7}, 12) =" for i in range(40)]
    columns = {"id": [f"a{i}" for i in range(40)], "size": pa.array(range(40), pa.int8())}
    write_input(folder / "in/a.parquet", {"prompt": pa.array(first).dictionary_encode()} | columns, row_group_size=7)
    second = ["The capital of France is", None, "", "word " * 3000, "apple, pear in alphabetical order:"]
    columns = {"id": [None] * 5, "size": pa.array([None] * 5, pa.int8())}
    write_input(folder / "in/deep/er/b.parquet", {"prompt": pa.array(second, pa.large_string())} | columns)
    none = {"prompt": pa.array([], pa.string()), "id": pa.array([], pa.string()), "size": pa.array([], pa.int8())}
    write_input(folder / "in/deep/none.parquet", none)
    columns = {"id": [f"z{i}" for i in range(20)], "size": pa.array(range(20), pa.int8())}
    write_input(folder / "in/z.parquet", {"prompt": first[:20]} | columns, row_group_size=10)
    damage(folder / "in/z.parquet", row_group=1)
    watcher = Watcher()
    result = run_job(make_spec(folder, output={"token_ids": True}), display=watcher)
    return folder, result, watcher


def test_every_row_is_there_once_and_in_its_place(mixed: Any) -> None:
    folder, result, _ = mixed
    rows = read_output(folder)
    places = [("a.parquet", i) for i in range(40)] + [("deep/er/b.parquet", i) for i in range(5)]
    places += [("z.parquet", i) for i in range(20)]
    assert [(row["source_file"], row["source_row"]) for row in rows] == places
    assert [row["id"] for row in rows] == [f"a{i}" for i in range(40)] + [None] * 5 + [
        f"z{i}" if i < 10 else None for i in range(20)
    ]
    assert (result.status.state, result.exit_code, result.did_nothing) == (State.SUCCEEDED, 0, False)


def test_good_rows_have_the_answers_of_an_engine_alone(mixed: Any) -> None:
    good = [row for row in read_output(mixed[0]) if row["error"] is None]
    assert len(good) == 52
    assert [row["generated_text"] for row in good] == greedy([row["prompt"] for row in good], 8)
    assert {row["finish_reason"] for row in good} <= {"stop", "length"}
    assert all(len(row["generated_token_ids"]) == row["num_generated_tokens"] for row in good)


def test_bad_rows_say_at_which_stage_and_why(mixed: Any) -> None:
    bad = [row for row in read_output(mixed[0]) if row["error"] is not None]
    assert Counter((row["error"]["stage"], row["error"]["code"]) for row in bad) == {
        ("read", "null_input"): 1, ("tokenize", "empty_prompt"): 1, ("too_long", "too_long"): 1,
        ("read", "unreadable"): 10,
    }  # fmt: skip
    assert all(row["generated_text"] is None and row["finish_reason"] == "error" for row in bad)


def test_the_accounting_closes(mixed: Any) -> None:
    folder, result, watcher = mixed
    status = accounting(folder)
    assert (status["state"], status["input_rows"], status["ok_rows"], status["failed_rows"]) == (
        "SUCCEEDED",
        65,
        52,
        13,
    )
    assert status["errors"] == {"unreadable": 10, "null_input": 1, "empty_prompt": 1, "too_long": 1}
    rows = read_output(folder)
    assert status["generated_tokens"] == sum(row["num_generated_tokens"] for row in rows)
    assert status["prompt_tokens"] == sum(row["num_prompt_tokens"] for row in rows if row["error"] is None)
    for seen in watcher.statuses:
        assert seen.input_rows == seen.ok_rows + seen.failed_rows + seen.pending_rows
    assert asdict(watcher.statuses[-1]) == asdict(result.status)


def test_all_parts_have_one_schema_and_say_where_they_come_from(mixed: Any) -> None:
    folder, *_ = mixed
    parts = sorted((folder / "out").glob("*.parquet"))
    assert len(parts) == 5  # 65 rows in shards of 16
    schemas = {pq.read_schema(part).remove_metadata().to_string() for part in parts}
    assert len(schemas) == 1
    assert pq.read_schema(parts[0]).field("prompt").type == pa.string()
    records = [json.loads(pq.read_metadata(part).metadata[b"moray"]) for part in parts]
    assert [record["shard"] for record in records] == list(range(5))
    assert {record["spec"]["name"] for record in records} == {"test"}
    assert {record["model"] for record in records} == {str(TINY)}


def test_events_tell_the_story(mixed: Any) -> None:
    told = events(mixed[0])
    assert (told[0]["event"], told[-1]["event"], told[-1]["state"]) == ("started", "ended", "SUCCEEDED")
    assert sorted(event["shard"] for event in told if event["event"] == "committed") == list(range(5))
    assert {event["stage"] for event in told if event["event"] == "actor_ready"} == {"prepare", "worker", "commit"}
    assert any("sequences" in event["message"] for event in told if event["event"] == "log")


def test_the_report_tells_what_the_job_wrote(mixed: Any) -> None:
    folder, _, watcher = mixed
    assert watcher.notes[-1] == f"  report: {folder}/out/_job/report.html"
    data = read_report_data(OutputFolder(str(folder / "out")))
    rows = [row for row in read_output(folder) if row["error"] is None]
    assert (data.counts.ok, data.counts.failed, data.pending) == (len(rows), 13, 0)
    assert data.stats.finish_reasons == Counter(row["finish_reason"] for row in rows)
    assert {name: histogram.total() for name, histogram in data.stats.histograms.items()} == dict.fromkeys(
        ("prompt_tokens", "generated_tokens", "latency_ms"), len(rows)
    )
    assert {code: len(examples) for code, examples in data.examples.items()} == {
        "null_input": 1, "empty_prompt": 1, "too_long": 1, "unreadable": 3,
    }  # fmt: skip
    computed = rows[:-10]  # the last ones are equal to earlier ones
    assert data.counts.copied == len(rows) - len(computed)
    ran = sum(
        row["num_prompt_tokens"] + row["num_generated_tokens"] - (row["finish_reason"] == "length") for row in computed
    )
    tokens = data.expert_tokens
    assert tokens is not None and [sum(layer) for layer in tokens] == [2 * ran] * len(tokens)
    ((process,), versions) = data.runs[0].processes, data.runs[0].versions
    assert process.ready is not None and not process.has_died and process.about["dtype"] == "bfloat16"
    assert versions.keys() == {"moray", "python", "ray", "torch"}
    assert "52 ok" in (folder / "out/_job/report.html").read_text()


def test_what_was_foretold_came_true(mixed: Any) -> None:
    folder, result, watcher = mixed
    told = json.loads((folder / "out/_job/forecast.json").read_text())
    assert told["rows"] == 65 and told["error_rows"] == dict(result.status.errors)
    assert told["prompt_tokens"] == dict.fromkeys(("expected", "low", "high"), result.status.prompt_tokens)
    assert told["generated_tokens"] == {"expected": None, "low": 0, "high": 52 * 8}
    assert watcher.notes[0] == "test: 65 rows in 4 files, 5 shards, at most 520 tokens to generate"
    line = f"test: {result.status.prompt_tokens} prompt tokens, 13 rows will fail (unreadable 10, "
    assert any(note.startswith(line) for note in watcher.notes)


def test_one_speed_is_told_everywhere(mixed: Any) -> None:
    folder, result, watcher = mixed
    speed = result.status.tokens_per_s
    assert speed > 0 and {status.tokens_per_s for status in watcher.statuses if status.state.is_final} == {speed}
    out = OutputFolder(str(folder / "out"))
    assert accounting(folder)["tokens_per_s"] == tokens_per_s(read_report_data(out)) == speed
    earlier = speed_of_earlier_run(out)
    assert earlier is not None and earlier.tokens_per_s == speed


def test_nothing_is_left_behind(mixed: Any) -> None:
    folder, *_ = mixed
    assert not list((folder / "out/_job/tmp").iterdir())
    assert {path.name for path in (folder / "out/_job").iterdir()} == {
        "spec.yaml", "plan.json", "forecast.json", "status.json", "report.html", "events", "tmp",
    }  # fmt: skip


def test_a_complete_job_run_again_does_nothing_and_says_so(mixed: Any, watcher: Any) -> None:
    folder, first, _ = mixed
    before = {path: path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("*"))}
    again = run_job(make_spec(folder, output={"token_ids": True}), display=watcher)
    assert (again.did_nothing, again.exit_code) == (True, 0)
    assert watcher.notes == ["All 65 rows are done already: nothing to do."]
    assert before == {path: path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("*"))}
    assert (again.status.ok_rows, again.status.errors) == (first.status.ok_rows, first.status.errors)


def test_a_changed_job_is_refused_with_the_differences(mixed: Any) -> None:
    folder, *_ = mixed
    with pytest.raises(OutputError) as error:
        run_job(make_spec(folder, output={"token_ids": True}, sampling={"max_tokens": 9, "seed": 4}))
    assert str(error.value).splitlines()[1:] == ["  sampling.max_tokens: 8 -> 9", "  sampling.seed: 0 -> 4"]


def test_what_does_not_change_answers_may_change(mixed: Any) -> None:
    folder, *_ = mixed
    spec = make_spec(
        folder,
        output={"token_ids": True},
        engine={"max_num_seqs": 3},
        workers={"max": 2},
        limits={"max_failed_rows": 13},
    )
    assert run_job(spec).did_nothing


def test_a_part_that_is_lost_is_written_again_and_no_other(mixed: Any) -> None:
    """The last test with this job: its next run has a status of its own."""
    folder, *_ = mixed
    rows = read_output(folder)
    lost, *others = sorted((folder / "out").glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    again = run_job(make_spec(folder, output={"token_ids": True}))
    assert (again.did_nothing, again.exit_code) == (False, 0)
    assert read_output(folder) == rows and verify(str(folder / "out")).closes
    assert before == {path: path.stat().st_mtime_ns for path in others}


@pytest.mark.slow
def test_messages_with_several_samples_and_logprobs(tmp_path: Path) -> None:
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    chats = [[{"role": "user", "content": f"What is {i} + 4?"}] for i in range(5)]
    chats.insert(2, [{"role": "user", "content": None}])
    write_input(tmp_path / "in/a.parquet", {"chat": pa.array(chats, messages), "n": range(6)})
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    spec = make_spec(
        tmp_path,
        input={"messages": "chat"},
        template={"system": "Be brief.", "chat": template},
        sampling={"n": 3, "temperature": 1.0, "seed": 5, "stop": [" "], "max_tokens": 200},
        output={"logprobs": 2, "keep": ["n"]},
    )
    result = run_job(spec)
    assert (result.status.ok_rows, result.status.failed_rows) == (5, 1)
    rows = read_output(tmp_path)
    assert [(row["n"], row["sample"]) for row in rows] == [
        (n, sample) for n in range(6) for sample in ([0] if n == 2 else range(3))
    ]
    good = [row for row in rows if row["error"] is None]
    assert not any(" " in row["generated_text"] for row in good)
    assert all(len(row["logprobs"]) == row["num_generated_tokens"] for row in good)
    assert all(len(token["top"]) == 2 for row in good for token in row["logprobs"])
    assert rows[6]["error"]["code"] == "bad_messages" and rows[6]["logprobs"] is None
    assert {row["finish_reason"] for row in good} == {"stop"}


@pytest.mark.slow
def test_token_ids_with_sampling_of_their_own_and_a_time_limit(tmp_path: Path) -> None:
    ids = [[5 + i, 6, 7] for i in range(12)]
    columns = {
        "ids": pa.array([*ids, None, [10**6]], pa.list_(pa.int32())),
        "length": pa.array([3 + i for i in range(12)] + [1, 1], pa.int64()),
        "bad": pa.array([1.0] * 11 + [99.0] + [1.0] * 2),
    }
    columns["length"] = pa.array([*range(3, 14), 3, 1, 1])
    write_input(tmp_path / "in/a.parquet", columns)
    spec = make_spec(
        tmp_path,
        input={"token_ids": "ids"},
        sampling={"ignore_eos": True, "columns": {"max_tokens": "length", "temperature": "bad"}},
        limits={"row_timeout_s": 600},
        output={"keep": "none"},
    )
    assert run_job(spec).status.errors == {"bad_params": 1, "null_input": 1, "bad_token_id": 1}
    rows = read_output(tmp_path)
    assert [row["num_generated_tokens"] for row in rows] == [*range(3, 14), 0, 0, 0]
    assert "temperature" in rows[11]["error"]["message"]


@pytest.mark.slow
def test_rows_that_take_too_long_fail_and_too_many_of_them_end_the_job(tmp_path: Path) -> None:
    prompts = {"prompt": [f"count {i}" for i in range(64)], "length": [2] * 16 + [2000] * 48}
    write_input(tmp_path / "in/a.parquet", prompts)
    spec = make_spec(
        tmp_path,
        sampling={"ignore_eos": True, "columns": {"max_tokens": "length"}},
        engine={"max_num_seqs": 8},
        limits={"row_timeout_s": 0.2, "max_failed_rows": 3},
    )
    result = run_job(spec)
    status = result.status
    assert (status.state, result.exit_code) == (State.FAILED, 1)
    assert status.reason is not None and status.reason.endswith("rows failed; limits.max_failed_rows is 3")
    assert status.errors.keys() == {"row_timeout"}
    late = [row for row in read_output(tmp_path) if row["error"] is not None]
    assert {row["error"]["stage"] for row in late} == {"generate"}
    assert len(late) == status.failed_rows > 3
    assert accounting(tmp_path)["state"] == "FAILED"


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_the_users_mistake(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Missing: model"):
        run_job(make_spec(tmp_path, model={"path": str(tmp_path / "model")}))
    status = accounting(tmp_path)
    assert (status["state"], status["pending_rows"]) == ("FAILED", 1)
    assert "do not fit its config.json" in status["reason"]


@pytest.mark.slow
def test_a_job_out_of_time_ends_at_once(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"count {i}" for i in range(64)]})
    endless = {"max_tokens": 1900, "ignore_eos": True}
    result = run_job(make_spec(tmp_path, sampling=endless, limits={"job_timeout_s": 12}))
    assert (result.status.state, result.status.reason) == (State.FAILED, "job_timeout_s (12) is over")
    assert (result.status.pending_rows, result.exit_code) == (64, 1)


@pytest.mark.slow
def test_a_driver_that_was_started_again_has_what_is_left_of_the_jobs_time(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["count"]})
    spec = make_spec(tmp_path, limits={"job_timeout_s": 3600})
    restart = Restart(1, "the driver was killed", "lost", spec.to_yaml(), time.monotonic() - 3600.0)
    result = run_job(spec, link=DriverLink(restart=restart))
    assert (result.status.state, result.status.reason) == (State.FAILED, "job_timeout_s (3600) is over")


def test_no_rows_are_soon_done(tmp_path: Path, watcher: Any) -> None:
    """And _job may be deleted, a status damaged, a report be one that cannot be written."""
    write_input(tmp_path / "in/a.parquet", {"prompt": pa.array([], pa.string())})
    spec, out = make_spec(tmp_path), tmp_path / "out"
    for _ in range(2):
        result = run_job(spec, display=watcher)
        assert (result.status.state, result.exit_code, result.status.input_rows) == (State.SUCCEEDED, 0, 0)
        assert watcher.notes[-1] == f"  report: {out}/_job/report.html" and (out / "_job/report.html").exists()
        found = verify(str(out))
        assert found.closes and found.input_rows == 0
        assert accounting(tmp_path)["state"] == "SUCCEEDED"
        shutil.rmtree(out / "_job")
    (out / "_job/report.html").mkdir(parents=True)
    (out / "_job/status.json").write_text("{")
    assert run_job(spec, display=watcher).exit_code == 0
    assert watcher.notes[-1].startswith("  The report could not be written: ")
    assert accounting(tmp_path)["state"] == "SUCCEEDED"
