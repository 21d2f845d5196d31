"""moray export: every row once, in the order of the input, in a file that appears as a whole; and who can read it."""

import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from engineless_job import run_engineless
from made_jobs import make_spec, write_input

from moray.batch.export import export as module
from moray.batch.export.export import Exported, export
from moray.batch.export.json_rows import encode_line, read_rows
from moray.batch.plan.planner import plan_job
from moray.engine.errors import OutputError, UserError


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A finished job of 40 rows of JSON lines, one of them broken, in three shards."""
    rows = [
        {"prompt": f"The sum of {i} and 1 is", "id": i, "tags": [{"n": i}], "custom_id": f"r{i}"} for i in range(40)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[17] = lines[17][:-5]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    assert len(run_engineless(make_spec(tmp_path)).plan.shards) == 3
    return tmp_path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_the_order_of_the_input(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)
    target = job / "out.jsonl"
    assert export(str(job / "out"), str(target)) == Exported(40, 0)
    rows = read(target)
    assert [row["source_row"] for row in rows] == list(range(40))
    own = ["sample", "generated_text", "finish_reason", "num_prompt_tokens", "num_generated_tokens"]
    assert list(rows[0]) == ["prompt", "id", "tags", "custom_id", *own, "error", "source_file", "source_row"]
    assert rows[3]["tags"] == [{"n": 3}] and rows[3]["id"] == 3 and rows[3]["error"] is None
    assert rows[17]["error"]["code"] == "invalid_json" and rows[17]["generated_text"] is None
    assert list(job.glob(".out*")) == []


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed(job: Path, suffix: str) -> None:
    target = job / f"out.jsonl.{suffix}"
    export(str(job / "out"), str(job / "out.ndjson"))
    export(str(job / "out"), str(target))
    raw = target.read_bytes()
    plain = gzip.decompress(raw) if suffix == "gz" else pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()
    assert plain == (job / "out.ndjson").read_bytes()


def test_the_file_is_input_again(job: Path) -> None:
    target = job / "again.jsonl.zst"
    export(str(job / "out"), str(target))
    spec = make_spec(job, input={"path": str(target)}, output={"path": str(job / "o2"), "keep": ["id", "tags"]})
    files = plan_job(spec).input
    assert files.num_rows == 40 and str(files.output_schema.field("tags").type) == "string"


def test_a_job_that_is_not_done(job: Path) -> None:
    next((job / "out").glob("part-*-000001.parquet")).unlink()
    target = job / "out.jsonl"
    target.write_text("before")
    with pytest.raises(
        OutputError, match=r"16 of 40 rows are not done; run the job to its end, or export .* --partial"
    ):
        export(str(job / "out"), str(target))
    assert target.read_text() == "before"
    assert export(str(job / "out"), str(target), partial=True) == Exported(24, 16)
    assert [row["source_row"] for row in read(target)] == [*range(16), *range(32, 40)]


@pytest.mark.parametrize("target", ["out.json", "out.parquet", "s3://b/out.jsonl", "out.jsonl.br"])
def test_targets_that_are_none(job: Path, target: str) -> None:
    with pytest.raises(UserError, match="must be a local file named"):
        export(str(job / "out"), target)


def test_a_damaged_part_leaves_no_file(job: Path) -> None:
    part = next((job / "out").glob("part-*-000001.parquet"))
    content = bytearray(part.read_bytes())
    content[4:400] = b"\xff" * 396
    part.write_bytes(content)
    with pytest.raises(OutputError, match="cannot be read"):
        export(str(job / "out"), str(job / "out.jsonl"))
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        export(str(job / "out"), str(job / "none/out.jsonl"))
    assert list(job.glob("*out.jsonl*")) == []


def test_openai_lines(job: Path) -> None:
    from openai.types.completion import Completion

    target = job / "out.jsonl"
    assert export(str(job / "out"), str(target), as_openai=True).lines == 40
    rows = read(target)
    assert [row["custom_id"] for row in rows[:17]] == [f"r{i}" for i in range(17)]
    body = rows[3]["response"]["body"]
    Completion.model_validate(body | {"created": 0})
    assert body["choices"][0]["finish_reason"] == "length" and body["model"] == "tiny-phimoe"
    assert rows[17]["custom_id"] == "a.jsonl:17" and rows[17]["response"] is None
    assert rows[17]["error"]["code"] == "invalid_json"


def test_openai_chats_with_samples(tmp_path: Path) -> None:
    from openai.types.chat import ChatCompletion

    write_input(tmp_path / "in/a.parquet", {"m": [[{"role": "user", "content": "hi"}]] * 2})
    run_engineless(make_spec(tmp_path, input={"messages": "m"}, sampling={"n": 3, "temperature": 1.0}))
    export(str(tmp_path / "out"), str(tmp_path / "o.jsonl"), as_openai=True)
    first, second = read(tmp_path / "o.jsonl")
    chat = ChatCompletion.model_validate(first["response"]["body"] | {"created": 0})
    assert [choice.index for choice in chat.choices] == [0, 1, 2] and chat.usage is not None
    assert chat.usage.completion_tokens == 3 and second["custom_id"] == "a.parquet:1"


def test_values_of_every_type() -> None:
    at = dt.datetime(2024, 5, 1, 12, 30, 0, 250)
    columns = {
        "map": pa.array([[("a", [("b", 1)])], None], pa.map_(pa.string(), pa.map_(pa.string(), pa.int8()))),
        "json": pa.array(['{"a": 1}', "broken"], pa.json_()),
        "ns": pa.array([1, None], pa.timestamp("ns")),
        "at": pa.array([at, None], pa.timestamp("us", "UTC")),
        "late": pa.array([3_000_000, 1], pa.int32()).view(pa.date32()),
        "price": pa.array([Decimal("1.50"), None]),
        "nan": pa.array([float("nan"), 1.5]),
        "bytes": pa.array([b"\xff", None]),
        "rows": pa.array([[{"m": [("k", 1)]}], []], pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.int8()))]))),
    }
    (batch,) = pa.table(columns).to_batches()
    first, second = (json.loads(encode_line(row)) for row in read_rows(batch))
    assert first == {
        "map": {"a": {"b": 1}},
        "json": {"a": 1},
        "ns": "1970-01-01T00:00:00.000000001",
        "at": "2024-05-01T12:30:00.000250Z",
        "late": "10183-09-21",
        "price": "1.50",
        "nan": None,
        "bytes": "_w==",
        "rows": [{"m": {"k": 1}}],
    }
    assert (second["json"], second["nan"], second["late"], second["ns"]) == ("broken", 1.5, "1970-01-02", None)


def test_who_reads_the_parts_and_the_export(job: Path) -> None:
    import datasets
    import duckdb
    import pandas as pd
    import polars as pl

    target, parts = str(job / "out.jsonl"), str(job / "out/part-*.parquet")
    export(str(job / "out"), target)
    assert len(pd.read_parquet(job / "out")) == len(pd.read_json(target, lines=True)) == 40
    assert pl.read_parquet(parts)["tags"].to_list()[3] == '[{"n":3}]'
    assert pl.read_ndjson(target)["error"].struct.field("code").null_count() == 39
    assert duckdb.sql(f"select count(*), count(error), max(tags->>'$[0].n') from '{parts}'").fetchall() == [
        (40, 1, "9")
    ]
    assert duckdb.sql(f"select error.code from '{target}' where error is not null").fetchall() == [("invalid_json",)]
    for kind, files in (("parquet", parts), ("json", target)):
        read = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(job / "cache"))
        assert len(read) == 40 and read[17]["error"]["code"] == "invalid_json"
