"""The output of a job with typed columns, as other programs read it: each value is the one that pyarrow reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY, make_spec, write_input
from stages_alone import run_alone

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine

Rows = list[dict[str, Any]]
SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["sum", "word"]},
        "note": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        "place": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 4}, "share": {"enum": [0.5, 2.25, None]}},
            "required": ["name", "share"],
        },
        "items": {
            "type": "array",
            "items": {"type": "object", "properties": {"n": SMALL, "is": {"type": "boolean"}}, "required": ["n"]},
            "maxItems": 2,
        },
        "open": {"type": "object", "additionalProperties": SMALL, "maxProperties": 1},
    },
    "required": ["kind", "note", "place", "items", "open"],
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a job with all optional columns, kept ones of nested types, an error and texts cut short."""
    folder = tmp_path_factory.mktemp("readers")
    columns = {
        "prompt": [*(f"{i} sheep, {i % 7} lions:" for i in range(24)), None],
        "tags": [None if i % 5 == 0 else [f"t{i}", None][: i % 3] for i in range(25)],
        "at": pa.array([None, *range(24)], pa.timestamp("us", "UTC")),
        "who": pa.array([{"name": "é", "ids": [i]} if i % 4 else None for i in range(25)]),
    }
    write_input(folder / "in/a.parquet", columns)
    spec = make_spec(
        folder,
        model={"dtype": "float32"},
        sampling={
            "max_tokens": 90, "temperature": 1.0, "seed": 3, "n": 2, "structured": {"json_schema": SCHEMA},
        },
        output={"parse": True, "token_ids": True, "logprobs": 1},
        engine={"max_num_seqs": 16},
    )  # fmt: skip
    engine = Engine(str(TINY), EngineConfig(dtype="float32", device="cpu", max_num_seqs=16, kv_cache_memory=2**24))
    return run_alone(spec, engine)


def ordered(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: (row["source_row"], row["sample"]))


def read_polars(folder: Path) -> Rows:
    import polars as pl

    return pl.read_parquet(folder / "part-*.parquet").to_dicts()


def read_duckdb(folder: Path) -> Rows:
    import duckdb

    duckdb.sql("set timezone = 'UTC'")
    found: Rows = duckdb.sql(f"from '{folder}/part-*.parquet'").to_arrow_table().to_pylist()
    return found


def read_datasets(folder: Path) -> Rows:
    import datasets

    cache = str(folder.parent / "cache")
    files = str(folder / "part-*.parquet")
    return list(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache))


def read_spark(folder: Path) -> Rows:
    """Read the folder as it is. Spark brings a JVM, so it is no requirement of the tests."""
    pytest.importorskip("pyspark")
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.sql.session.timeZone", "UTC").getOrCreate()
    try:
        return [row.asDict(recursive=True) for row in spark.read.parquet(str(folder)).collect()]
    finally:
        spark.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the programs that read
@pytest.mark.parametrize("read", [read_polars, read_duckdb, read_datasets, read_spark])
def test_each_value_is_read_as_it_is(job: Path, read: Callable[[Path], Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    expected = ordered(pa.concat_tables(map(pq.read_table, sorted(job.glob("part-*.parquet")))).to_pylist())
    parsed = [row["parsed"] for row in expected if row["parsed"] is not None]
    assert 10 < len(parsed) < len(expected) - 1, "some are cut, one row is an error"
    assert any(value["items"] for value in parsed) and any(value["note"] is None for value in parsed)
    assert {type(value["open"]) for value in parsed} == {str}, "JSON text"
    found = ordered(read(job))
    for row in found:  # Spark's timestamps are in the time of this process
        row["at"] = None if row["at"] is None else row["at"].replace(tzinfo=expected[-1]["at"].tzinfo)
    assert found == expected
