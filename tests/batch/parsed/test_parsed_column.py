"""JSON texts read into typed columns: exact or null, and the same in pandas and polars."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from moray.batch.parsed.column import parse_column
from moray.batch.parsed.json_type import JSON, JsonType

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "share": {"type": "number"},
        "is_new": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        "places": {"type": "array", "items": {"type": "object", "properties": {"city": {"type": "string"}}}},
        "more": {"type": "object"},
    },
}
TYPE = JsonType.of_structured("json_schema", json.dumps(SCHEMA))
WHOLE = (
    '{"name":"Zoë","age":36,"share":0.25,"is_new":true,"tags":["b","a"],"places":[{"city":"Rome"},{}],'
    '"more":{"x":1e400,"x":[0.10,null]}}'
)


def parse(*texts: str | None, kind: JsonType = TYPE, reason: str = "stop") -> list[Any]:
    found: list[Any] = parse_column(texts, [reason] * len(texts), kind).to_pylist()
    return found


def test_every_type_of_value() -> None:
    assert parse(WHOLE) == [
        {
            "name": "Zoë", "age": 36, "share": 0.25, "is_new": True, "tags": ["b", "a"],
            "places": [{"city": "Rome"}, {"city": None}], "more": '{"x":1e400,"x":[0.10,null]}',
        }
    ]  # fmt: skip
    (row,) = parse('{"age":null}')
    assert set(row.values()) == {None} and list(row) == list(SCHEMA["properties"])
    assert parse(None, "") == [None, None]


def test_what_max_tokens_cut_is_null_even_where_it_looks_complete() -> None:
    assert parse(WHOLE, reason="length") == [None]
    assert parse("12", kind=JsonType("integer"), reason="length") == [None]
    assert parse("12", kind=JsonType("integer")) == [12]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE[:-1], WHOLE + "x", "[]", "null x",
        '{"age":9223372036854775808}', '{"age":1e19}', '{"age":1e999999999999}',
        '{"age":1.5}', '{"age":"1"}', '{"age":true}', '{"share":1e400}', '{"share":NaN}', '{"is_new":0}', '{"name":1}',
        '{"name":"\\ud800"}', '{"more":{"x":"\\ud800"}}', '{"tags":"a"}', '{"places":[[]]}', '{"other":1}',
        '{"name":"a","name":"b"}', '{"places":[{"city":"a","state":"b"}]}', '{"more":' + "[" * 5000 + "]" * 5000 + "}",
        '{"age":' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_what_a_type_does_not_hold_exactly_is_null(text: str) -> None:
    assert parse(text) == [None]


def test_numbers_at_the_ends_of_their_types() -> None:
    kind = JsonType("integer")
    whole = [2**63 - 1, -(2**63), 0]
    assert parse(*map(str, whole), "-0", "1.0", "1e3", "120e-1", kind=kind) == [*whole, 0, 1, 1000, 12]
    assert parse("1e308", "5e-324", "3", kind=JsonType("number")) == [1e308, 5e-324, 3.0]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_VALUES)
@settings(max_examples=30)
def test_json_stays_what_it_is(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (found,) = parse(text, kind=JSON)
    assert found == (None if value is None else text)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.text(),
            "age": st.none() | st.integers(-(2**63), 2**63 - 1),
            "share": st.floats(allow_nan=False, allow_infinity=False),
            "is_new": st.booleans(),
            "tags": st.lists(st.sampled_from("ab")),
            "places": st.lists(st.fixed_dictionaries({"city": st.text()})),
        },
    )
)
def test_every_value_comes_back(value: dict[str, Any]) -> None:
    (found,) = parse(json.dumps(value))
    assert found == dict.fromkeys(SCHEMA["properties"]) | value


def test_pandas_and_polars_read_it(tmp_path: Path) -> None:
    texts, path = [WHOLE, None, '{"age":null}'], tmp_path / "part.parquet"
    pq.write_table(pa.table({"parsed": parse_column(texts, ["stop"] * 3, TYPE)}), path)
    in_pandas = pd.read_parquet(path)["parsed"]
    assert in_pandas[0]["places"][0]["city"] == "Rome" and in_pandas[1] is None and in_pandas[2]["age"] is None
    fields = pl.read_parquet(path).unnest("parsed")
    assert dict(fields.schema) == {
        "name": pl.String(), "age": pl.Int64(), "share": pl.Float64(), "is_new": pl.Boolean(),
        "tags": pl.List(pl.String()), "places": pl.List(pl.Struct({"city": pl.String()})), "more": pl.String(),
    }  # fmt: skip
    assert fields["age"].to_list() == [36, None, None]
    assert fields["places"].to_list()[0] == [{"city": "Rome"}, {"city": None}]
