"""Prepare over files of JSON lines: values of any kind in any row, and one error row for each that cannot run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from engineless_job import run_engineless
from made_jobs import TINY, make_spec

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.json_values import json_field
from moray.batch.output.failed_rows import find_failed
from moray.batch.output.folder import OutputFolder
from moray.batch.output.num_samples import planned_samples
from moray.batch.output.part import find_committed
from moray.batch.shards import Shard, Slice
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.shard_item import ShardItem
from moray.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    def run(*rows: Any, **sections: Any) -> list[dict[str, Any]]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in/a.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        spec = make_spec(tmp_path, **sections)
        files = read_input(spec)
        kept = pa.schema([files.output_schema.field(name) for name in files.kept_columns])
        reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema, files.layout)
        stage = Prepare(spec, reader, Prompts(spec, tokenizer, 500), kept, 100)
        table = stage.block(Shard(0, (Slice("a.jsonl", 0, len(rows)),)), "part")
        found: list[dict[str, Any]] = table.to_pylist()
        for row in found:
            row["params"] = row["params"] and pickle.loads(row["params"])
        return found

    return run


def outcomes(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["error"] and (row["error"]["stage"], row["error"]["code"]) for row in rows]


def test_a_row_that_is_no_json_or_no_text_is_an_error_row(prepare: Any, tokenizer: Tokenizer) -> None:
    rows = prepare({"prompt": "CAT is", "id": 1}, "{", {"prompt": 5, "id": [2]}, {"id": 3}, {"prompt": "DOG is"})
    assert outcomes(rows) == [None, ("read", "invalid_json"), ("read", "bad_value"), ("read", "null_input"), None]
    assert rows[1]["error"]["message"].startswith("row 1 of a.jsonl is not valid JSON: EOF")
    assert rows[2]["error"]["message"] == "column 'prompt' must be text, is 5"
    assert [row["input.prompt"] for row in rows] == ['"CAT is"', None, "5", None, '"DOG is"']
    assert [row["input.id"] for row in rows] == ["1", None, "[2]", "3", None]
    assert [row["source_row"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["prompt_token_ids"] == tokenizer.encode_prompt("DOG is")


def test_token_ids(prepare: Any) -> None:
    rows = prepare(
        {"ids": [1, 2]}, {"ids": [1, 2.5]}, {"ids": [1, None]}, {"ids": "x"}, {"ids": []}, {"ids": [True]},
        input={"token_ids": "ids"},
    )  # fmt: skip
    bad = ("tokenize", "bad_token_id")
    assert outcomes(rows) == [None, bad, bad, ("read", "bad_value"), ("tokenize", "empty_prompt"), bad]
    assert rows[0]["prompt_token_ids"] == [1, 2]
    assert rows[1]["error"]["message"] == "token id 1 is 2.5; this model's go from 0 to 499"


def test_sampling_values(prepare: Any) -> None:
    columns = {name: name for name in ("temperature", "stop", "logit_bias", "max_tokens", "ignore_eos")}
    rows = prepare(
        {"prompt": "a", "temperature": 1, "stop": ["x"], "logit_bias": {"5": -1, "7": 2.5}, "max_tokens": 4.0},
        {"prompt": "b"},
        {"prompt": "c", "temperature": "hot"},
        {"prompt": "d", "logit_bias": {"x": 1}, "ignore_eos": True},
        {"prompt": "e", "stop": "x"},
        sampling={"columns": columns},
    )
    assert outcomes(rows) == [None, None, *[("read", "bad_params")] * 3]
    first = rows[0]["params"]
    assert (first.temperature, first.stop, first.logit_bias, first.max_tokens) == (1, ("x",), {5: -1, 7: 2.5}, 4)
    assert rows[1]["params"].max_tokens == 8


def test_a_template_takes_values_of_any_scalar_kind(prepare: Any, tokenizer: Tokenizer) -> None:
    rows = prepare(*({"x": x} for x in ("a", 5, 2.5, True, None, ["l"])), template={"prompt": "Say {x}"})
    assert outcomes(rows) == [None] * 4 + [("template", "null_column"), ("template", "bad_value")]
    assert [row["prompt_token_ids"] for row in rows[:3]] == [
        tokenizer.encode_prompt(f"Say {x}") for x in ("a", "5", "2.5")
    ]


def test_continuations(prepare: Any) -> None:
    rows = prepare(
        *({"prompt": "2 + 2 =", "choices": x} for x in (["4", "5"], "4", None, [], [4], {"a": 1})),
        task="score",
        input={"continuation": "choices"},
    )
    bad = ("read", "bad_value")
    empty = ("tokenize", "empty_continuation")
    assert outcomes(rows) == [None, None, ("read", "null_input"), empty, bad, bad]
    assert [len(row["continuations"]) for row in rows[:2]] == [2, 1]
    assert rows[4]["error"]["message"] == "entry 0 of column 'choices' must be text, is 4"


def test_variables_of_the_chat_template(prepare: Any, tokenizer: Tokenizer) -> None:
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}{{ who.name }}{{ n }}"
    messages = [{"role": "user", "content": "hi "}]
    rows = prepare(
        {"m": messages, "who": {"name": "Al"}, "n": [1, 2]},
        {"m": messages, "who": {"name": "Bo"}, "n": "x"},
        input={"messages": "m"},
        template={"chat": chat, "columns": {"who": "who", "n": "n"}},
    )
    assert [tokenizer.decode(row["prompt_token_ids"]) for row in rows] == ["hi Al[1, 2]", "hi Box"]


def test_verify_counts_the_samples_of_json_columns(tmp_path: Path) -> None:
    """Lists of continuations and numbers of samples that are JSON text in the parts."""
    (tmp_path / "in").mkdir()
    choices = [["4", "5", "6"], "4", ["7"]]
    (tmp_path / "in/a.jsonl").write_text("\n".join(json.dumps({"prompt": "2 + 2 =", "c": c}) for c in choices))
    files = read_input(make_spec(tmp_path, task="score", input={"continuation": "c"}))
    texts = pa.array([json.dumps(c) for c in choices])
    part = pa.Table.from_arrays([texts], schema=pa.schema([files.output_schema.field("c")]))
    assert planned_samples({"task": "score", "input.continuation": "c"}, part) == [3, 1, 1]
    ids = pa.array(["[1, 2]", "[[1], [2]]", None])
    part = pa.Table.from_arrays([ids], schema=part.schema)
    components = {"task": "score", "input.continuation": "c", "input.token_ids": "ids"}
    assert planned_samples(components, part) == [1, 2, None]
    part = pa.table({"n": pa.array(["2", None, '"x"'])}, schema=pa.schema([json_field("n", {"whole", "text"})]))
    assert planned_samples({"task": "generate", "sampling.n": 1, "sampling.columns": {"n": "n"}}, part) == [2, 1, "x"]


def test_a_retry_finds_its_row_in_the_middle_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(200)]
    lines[150] = "{"
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    spec = make_spec(tmp_path)
    job = run_engineless(spec)
    folder = OutputFolder(str(tmp_path / "out"))
    ((index, shard),) = find_failed(folder, job.plan, find_committed(folder, job.plan), ()).items()
    (piece,) = shard.slices
    assert (piece.first_row, piece.num_rows) == (150, 1) and piece.anchor is not None and piece.anchor[0] == 128
    reader = ShardReader(job.input.filesystem, job.input.root, ["prompt"], job.input.output_schema, job.input.layout)
    stage = Prepare(spec, reader, Prompts(spec, tokenizer, 500), pa.schema([]), 100)
    (row,) = stage(ShardItem.from_plan(shard, job.plan)).to_pylist()
    assert (row["shard"], row["source_row"], row["error"]["code"]) == (index, 150, "invalid_json")
