"""Columns that differ harmlessly between the files of a job have one type; where a value would be lost, none."""

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_jobs import make_spec, write_input

from moray.batch.input import read_input
from moray.batch.input.casts import cast
from moray.batch.input.reader import ShardReader
from moray.batch.input.type_union import unite
from moray.batch.shards import Slice
from moray.engine.errors import InputError

MIXED = pa.struct([("a", pa.int32()), ("b", pa.string())])


@pytest.mark.parametrize(
    ("one", "other", "united"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint32(), pa.int32(), pa.int64()),
        (pa.uint64(), pa.int64(), None),
        (pa.uint64(), pa.int8(), None),
        (pa.int16(), pa.float32(), pa.float32()),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.int64(), pa.float64(), None),
        (pa.null(), pa.date32(), pa.date32()),
        (pa.bool_(), pa.int8(), None),
        (pa.string(), pa.binary(), None),
        (pa.string(), pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
        (pa.timestamp("us"), pa.timestamp("ns"), None),
        (pa.decimal128(10, 2), pa.decimal128(12, 5), pa.decimal128(13, 5)),
        (pa.decimal128(38, 0), pa.decimal128(38, 30), None),
        (MIXED, pa.struct([("b", pa.string()), ("a", pa.int32())]), MIXED),
        (MIXED, pa.struct([("c", pa.int8())]), pa.struct([*MIXED, ("c", pa.int8())])),
        (MIXED, pa.struct([("a", pa.string())]), None),
        (pa.struct([("x", pa.int64())]), pa.struct([("x", pa.float64())]), None),
        (pa.list_(pa.null()), pa.large_list(pa.string()), pa.list_(pa.string())),
        (pa.list_(pa.int32(), 2), pa.list_(pa.int64(), 3), pa.list_(pa.int64())),
        (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int32()), pa.map_(pa.string(), pa.int32())),
        (pa.json_(), pa.string(), None),
        (pa.json_(), pa.null(), pa.json_()),
    ],
)
def test_types(one: pa.DataType, other: pa.DataType, united: pa.DataType | None) -> None:
    assert unite(one, other) == united
    there = unite(other, one)
    assert there == united or (united is not None and pa.types.is_struct(united) and there is not None)


NUMBERS = [pa.int8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64()]


@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.integers(-(2**63), 2**64 - 1))
def test_no_number_is_lost(one: pa.DataType, other: pa.DataType, number: int) -> None:
    united = unite(one, other)
    if united is None:
        return
    for kind in (one, other):
        try:
            array = pa.array([number], kind)
        except (pa.ArrowInvalid, OverflowError):
            continue
        assert cast(pa.chunked_array([array]), united).to_pylist() == array.to_pylist()


def unify(folder: Path, *tables: Any) -> tuple[pa.DataType, list[Any]]:
    """Return the type and the values of the column x of the files of these columns."""
    for number, table in enumerate(tables):
        if isinstance(table, pd.DataFrame):
            (folder / "in").mkdir(exist_ok=True)
            table.assign(prompt="a").to_parquet(folder / f"in/{number}.parquet", index=False)
        else:
            write_input(folder / f"in/{number}.parquet", {"prompt": ["a"] * len(table), "x": table})
    files = read_input(make_spec(folder))
    reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema, files.layout)
    read = [reader.read(Slice(file.path, 0, file.num_rows)) for file in files.files]
    return files.output_schema.field("x").type, pa.concat_tables(read)["x"].to_pylist()


def test_chats_whose_fields_are_in_another_order_or_more(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Add 1 and 3."}
    chats = [[user], [{"content": "x", "role": "user"}], [user | {"name": None}], [user | {"name": "bo"}], []]
    kind, found = unify(tmp_path, *(pa.array([chat]) for chat in chats))
    assert str(kind) == "list<item: struct<role: string, content: string, name: string>>"
    assert found == [[message | {"name": message.get("name")} for message in chat] for chat in chats]  # type: ignore[attr-defined]


def test_whole_numbers_that_pandas_wrote_as_floats(tmp_path: Path) -> None:
    kind, found = unify(tmp_path, pd.DataFrame({"x": [2019]}), pd.DataFrame({"x": [2019, None]}))
    assert (kind, found) == (pa.float64(), [2019.0, 2019.0, None])
    with pytest.raises(InputError) as error:
        unify(tmp_path, pa.array([2**53 + 1]), pa.array([0.5]))
    assert str(error.value) == (
        "0.parquet: column 'x' is int64, whose values double, the type that other files need, may not hold; name the "
        "columns to keep in output.keep"
    )
    pq.write_table(pa.table({"prompt": ["a"], "x": [1]}), tmp_path / "in/0.parquet", write_statistics=False)
    with pytest.raises(InputError, match="may not hold"):
        read_input(make_spec(tmp_path))


def test_units_of_timestamps(tmp_path: Path) -> None:
    at = dt.datetime(2024, 5, 1, 12, 30, 0, 250)
    kind, found = unify(tmp_path, pa.array([at], pa.timestamp("us")), pa.array([at, None], pa.timestamp("ns")))
    assert kind == pa.timestamp("ns") and [str(x)[:26] for x in found] == [str(at)] * 2 + ["None"]
    late = dt.datetime(9999, 12, 31)
    with pytest.raises(InputError, match=r"is timestamp\[us\], whose values timestamp\[ns\].* may not hold"):
        unify(tmp_path, pa.array([late], pa.timestamp("us")), pa.array([at], pa.timestamp("ns")))
    assert unify(tmp_path, pa.array([late], pa.timestamp("ms")), pa.array([at], pa.timestamp("us")))[1] == [late, at]


def test_decimals_and_empty_lists(tmp_path: Path) -> None:
    one, other = Decimal("1.50"), Decimal("1234567.12345")
    assert unify(tmp_path, pa.array([one]), pa.array([other]))[1] == [one, other]
    kind, found = unify(tmp_path, pa.array([[]], pa.list_(pa.null())), pa.array([["a"]]))
    assert str(kind) == "list<item: string>" and found == [[], ["a"]]


def test_a_column_of_later_files_is_said(tmp_path: Path) -> None:
    write_input(tmp_path / "in/0.parquet", {"prompt": ["a"]})
    write_input(tmp_path / "in/1.parquet", {"prompt": ["b"], "score": [0.5]})
    files = read_input(make_spec(tmp_path))
    assert files.kept_columns == ("prompt", "score")
    assert files.warnings == (
        "column 'score' is in 1 of 2 files, the first 1.parquet; it is null in the rows of the other files",
    )
