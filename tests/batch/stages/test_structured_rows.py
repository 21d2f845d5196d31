"""Rows whose text obeys a schema: what prepare makes of their columns, and what commit makes of their text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY, make_spec, write_input
from pyarrow import fs

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import read_part
from moray.batch.output.part_stats import PartStats
from moray.batch.output_columns import output_schema
from moray.batch.shards import Shard, Slice
from moray.batch.spec.structured import _read_checked
from moray.batch.stages.block_schemas import GENERATED, Failure
from moray.batch.stages.classify import classify, softmax
from moray.batch.stages.commit import Commit
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.row_params import unpack_params
from moray.engine.errors import InputError, SpecError
from moray.engine.structured.constraint import Structured
from moray.engine.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ERROR = Failure("generate", "row_timeout", "too slow").as_struct()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def prepare(folder: Path, tokenizer: Tokenizer, columns: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    write_input(folder / "in/a.parquet", columns)
    spec = make_spec(folder, **sections)
    files = read_input(spec)
    reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
    stage = Prepare(spec, reader, Prompts(spec, tokenizer, 1011), pa.schema([]), 100)
    block = stage.block(Shard(0, (Slice("a.parquet", 0, files.files[0].num_rows),)), "")
    return [row | {"params": params} for row, params in zip(block.to_pylist(), unpack_params(block), strict=True)]


def test_each_row_may_have_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _read_checked.cache_clear()
    schemas = [json.dumps(SCHEMA), None, '{"not": {}}', json.dumps(SCHEMA), None, None]
    choices = [None, ["x", "y"], None, ["x"], None, ["x", None]]
    rows = prepare(
        tmp_path,
        tokenizer,
        {"prompt": ["p"] * 6, "schema": schemas, "labels": choices},
        sampling={
            "structured": {"regex": "[0-9]+"},
            "columns": {"structured.json_schema": "schema", "structured.choice": "labels"},
        },
    )
    found = [row["params"] and row["params"].structured for row in rows]
    schema = json.dumps(SCHEMA, separators=(",", ":"))
    assert found[:2] == [Structured("json_schema", schema), Structured("choice", '["x","y"]')]
    assert (found[2], found[3], found[4]) == (None, None, Structured("regex", "[0-9]+"))
    errors = [row["error"] and (row["error"]["stage"], row["error"]["code"], row["error"]["message"]) for row in rows]
    assert errors == [
        None, None,
        ("read", "bad_grammar", 'sampling.columns: json_schema: Unimplemented keys: ["not"]'),
        ("read", "bad_params", "sampling.columns: structured: a row may have one kind, this one has json_schema and "
         "choice; set all but one to null"),
        None,
        ("read", "bad_grammar", "sampling.columns: choice must be a list of texts, is ['x', None]"),
    ]  # fmt: skip


def test_a_column_of_another_type_is_refused_before_the_job_runs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for kind, column, allowed in (("json_schema", [1], "text"), ("choice", ["x"], "a list of texts")):
        with pytest.raises(InputError, match=rf"sampling\.columns\.structured\.{kind}\) must be {allowed}"):
            columns = {"prompt": ["p"], "c": column}
            prepare(tmp_path, tokenizer, columns, sampling={"columns": {f"structured.{kind}": "c"}})


def test_a_kept_column_may_not_be_named_as_what_is_parsed(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["p"], "parsed": [1], "choice": [2]})
    structured = {"structured": {"json_schema": SCHEMA}}
    assert "parsed" in read_input(make_spec(tmp_path, sampling=structured)).output_schema.names
    parsed: dict[str, Any] = {"sampling": structured, "output": {"parse": True}}
    classified: dict[str, Any] = {"task": "classify", "sampling": {"structured": {"choice": ["a", "b"]}}}
    for sections, name in ((parsed, "parsed"), (classified, "choice")):
        with pytest.raises(SpecError, match=f"the job writes a column '{name}' of its own"):
            read_input(make_spec(tmp_path, **sections))


def commit(folder: Path, tokenizer: Tokenizer, texts: list[tuple[str, str]], **output: Any) -> list[dict[str, Any]]:
    """Commit rows with these texts and finish reasons, two samples each; return the rows of the part."""
    structured = {"structured": {"json_schema": SCHEMA}}
    spec = make_spec(folder, sampling=structured, output={"keep": "none", **output})
    rows = [
        {
            "shard": 0, "shard_rows": len(texts) // 2, "part": "part-0.parquet", "source_file": "a", "sample": i % 2,
            "source_row": i // 2, "num_prompt_tokens": 1, "finish_reason": reason, "num_generated_tokens": 3,
            "generated_token_ids": tokenizer.encode_texts([text], add_special_tokens=False)[0], "latency_s": 0.1,
            "engine_s": 0.0, "error": ERROR if reason == "error" else None,
        }
        for i, (text, reason) in enumerate(texts)
    ]  # fmt: skip
    made = Commit(
        str(folder / "out"), output_schema(spec, []), "f" * 64, {}, tokenizer,
        parsed_type=spec.parsed_type, is_structured=spec.is_structured,
    )  # fmt: skip
    made(pa.Table.from_pylist(rows, schema=GENERATED))
    found: list[dict[str, Any]] = pq.read_table(folder / "out/part-0.parquet").to_pylist()
    return found


def test_what_is_parsed_stands_beside_the_text_of_each_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [
        ('{"a":1}', "stop"), ('{"a":-2}', "stop"), ('{"a":3', "length"), ('{"a":4', "length"), ('{"a":5}', "stop"),
        ("", "error"), ('{"a":99999999999999999999}', "stop"), ('{"a":7', "length"),
    ]  # fmt: skip
    rows = commit(tmp_path, tokenizer, texts, parse=True)
    assert list(rows[0])[:3] == ["sample", "generated_text", "parsed"]
    assert [(row["source_row"], row["sample"], row["generated_text"], row["parsed"]) for row in rows] == [
        (0, 0, '{"a":1}', {"a": 1}), (0, 1, '{"a":-2}', {"a": -2}), (1, 0, '{"a":3', None), (1, 1, '{"a":4', None),
        (2, 0, None, None), (3, 0, texts[6][0], None), (3, 1, '{"a":7', None),
    ]  # fmt: skip
    _, record = read_part(OutputFolder(str(tmp_path / "out")), "part-0.parquet")
    assert (record["counts"]["ok"], record["counts"]["failed"], record["counts"]["cut"]) == (3, 1, 2)
    assert PartStats.from_json(record["tally"]).unparsed == 1


def test_without_parse_there_is_no_column_and_cut_rows_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = commit(tmp_path, tokenizer, [('{"a":1}', "stop"), ('{"a":3', "length")])
    assert "parsed" not in rows[0]
    _, record = read_part(OutputFolder(str(tmp_path / "out")), "part-0.parquet")
    assert record["counts"]["cut"] == 1 and "unparsed" not in record["tally"]


def scores(rows: list[list[float | None]]) -> pa.Table:
    """A block of a job that classifies: the logprobs of each row's choices; None alone = the row failed."""
    samples = [
        {"source_row": row, "sample": i, "logprob": logprob, "num_continuation_tokens": None if logprob is None else 2,
         "error": ERROR if logprob is None else None}
        for row, logprobs in enumerate(rows)
        for i, logprob in enumerate(logprobs)
    ]  # fmt: skip
    return pa.Table.from_pylist(samples, schema=GENERATED)


def test_a_row_gets_the_likeliest_choice_and_the_probability_of_each() -> None:
    found = classify(scores([[-1.0, -2.0, -3.0], [None], [-900.0, -700.0, -700.0]]), ["no", "yes", "a b"]).to_pylist()
    assert [row["choice"] for row in found] == ["no", None, "yes"]
    assert list(found[0]["probabilities"]) == ["no", "yes", "a b"]
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1.0)
    assert found[0]["probabilities"]["yes"] == pytest.approx(0.2447284710547976)
    assert found[1]["probabilities"] is None and found[1]["error"] == ERROR
    assert list(found[2]["probabilities"].values()) == pytest.approx([0.0, 0.5, 0.5], abs=1e-80)
    assert [row["num_continuation_tokens"] for row in found] == [6, None, 6]


def test_shares_of_probabilities_that_no_double_holds() -> None:
    assert softmax([-5000.0, -5000.0]) == [0.5, 0.5]
    assert softmax([0.0, -5000.0]) == [1.0, 0.0]
