"""Parameters travel as they were, and what rows share is in a block once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_jobs import TINY, make_spec, write_input
from pyarrow import fs

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Shard, Slice
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.results import read_rows
from moray.batch.stages.row_params import COLUMNS, pack_params, unpack_params
from moray.engine.params import SamplingParams
from moray.engine.structured.constraint import Structured
from moray.engine.text.tokenizer import Tokenizer

ROWS = 200


def schema(number: int) -> str:
    properties = {"a": {"maxLength": number, "description": "x" * 4000}}
    return json.dumps({"type": "object", "properties": properties}, separators=(",", ":"))


def table_of(params: list[SamplingParams | None]) -> pa.Table:
    packed = pack_params(params)
    return pa.table({name: pa.array(packed[name], kind) for name, kind in COLUMNS})


def test_they_arrive_as_they_were() -> None:
    free = SamplingParams(max_tokens=3, stop=("a",), logit_bias={4: 1.5})
    bound = replace(free, structured=Structured("regex", "a+"))
    params = [free, None, bound, replace(bound, seed=4), bound, replace(free), None]
    both = pa.concat_tables([table_of(params), table_of([bound, None])])  # whose dictionaries differ
    found = unpack_params(both)
    assert found == [*params, bound, None]
    assert found[2] is found[4] is found[7] and found[0] is found[5]
    assert found[3] is not None and found[2] is not None and found[3].structured is found[2].structured
    assert unpack_params(both.slice(2, 2)) == params[2:4]
    assert unpack_params(table_of([])) == []


FOUR = [schema(1 + i % 4) for i in range(ROWS)]


@pytest.mark.parametrize(
    ("columns", "sampling", "schemas"),
    [
        ({}, {"structured": {"json_schema": schema(1)}}, [schema(1)] * ROWS),
        (
            {"s": range(ROWS)},
            {"structured": {"json_schema": schema(1)}, "columns": {"seed": "s"}},
            [schema(1)] * ROWS,
        ),
        ({"s": FOUR}, {"columns": {"structured.json_schema": "s"}}, FOUR),
    ],
    ids=["one schema", "one schema and many seeds", "four schemas"],
)
def test_a_block_has_each_schema_once(
    tmp_path: Path, columns: dict[str, Any], sampling: dict[str, Any], schemas: list[str]
) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i}" for i in range(ROWS)], **columns})
    spec = make_spec(tmp_path, sampling=sampling)
    files = read_input(spec)
    reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
    stage = Prepare(spec, reader, Prompts(spec, Tokenizer(TINY), 1011), pa.schema([]), 100)
    block = stage.block(Shard(0, (Slice("a.parquet", 0, ROWS // 2), Slice("a.parquet", ROWS // 2, ROWS // 2))), "")
    assert block.num_rows == ROWS
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block)
    content = sink.getvalue().to_pybytes()
    assert content.count(b"x" * 4000) <= 2 * 4, "once in the rows of each slice, for each of four"
    params = [row.request.params for row in read_rows(block)]
    found = [one.structured for one in params if one.structured is not None]
    assert [one.text for one in found] == schemas
    assert len(set(map(id, found))) <= 2 * len(set(schemas))
