"""Prepare never raises, whatever a Parquet file holds: each row has a prompt or an error that names its column."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arrow_values import ROWS, arrays, chats, id_lists, text_lists, text_of, texts
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made_jobs import TINY, make_spec, write_input
from pyarrow import fs

from moray.batch.input import InputFiles, read_input
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Shard, Slice
from moray.batch.stages.commit import Commit
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.results import build_result_block, read_rows
from moray.batch.worker.in_flight_shard import InFlightShard
from moray.engine.errors import UserError
from moray.engine.request import Completion
from moray.engine.text.tokenizer import Tokenizer

VOCAB = 500
slowly = settings(
    max_examples=int(os.environ.get("MORAY_TEST_EXAMPLES", "25")), suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def run(folder: Path, tokenizer: Tokenizer, columns: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    """Return the rows of the part of a job over the columns, without the kept columns; its engine generates nothing."""
    write(folder / "in/a.parquet", columns)
    spec = make_spec(folder, **sections)
    files = read_input(spec)
    kept = pa.schema([files.output_schema.field(name) for name in files.kept_columns])
    reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
    prepared = Prepare(spec, reader, Prompts(spec, tokenizer, VOCAB), kept, 2000)
    block = prepared.block(Shard(0, (Slice("a.parquet", 0, ROWS),)), "part-x.parquet")
    commit(block, files, folder, tokenizer)
    table = pq.read_table(folder / "out/part-x.parquet")
    assert table["source_row"].to_pylist() == list(range(ROWS))
    return table.select(["source_row", "error", "num_prompt_tokens"]).to_pylist()


def commit(block: pa.Table, files: InputFiles, folder: Path, tokenizer: Tokenizer) -> None:
    rows = list(read_rows(block))
    done = {row.index: [Completion((), "length", 1)] * row.request.num_samples for row in rows}
    made = build_result_block(block, InFlightShard(0, rows, done, dict.fromkeys(done, 0.1)))
    Commit(str(folder / "out"), files.output_schema, "f" * 64, {}, tokenizer)(made)


def write(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(pa.table(columns), path)
    except pa.ArrowException:  # nobody has a file like that
        assume(False)


def check(rows: list[dict[str, Any]], *columns: str) -> None:
    for row in rows:
        if row["error"] is not None:
            assert row["error"]["code"] not in ("unreadable", ""), row
            assert any(repr(name) in row["error"]["message"] for name in columns) or row["error"]["code"] in (
                "bad_params",
                "bad_messages",
                "bad_token_id",
                "empty_prompt",
                "too_long",
            ), row
        else:
            assert row["num_prompt_tokens"] > 0


def test_kept_columns_of_any_type_are_written_or_refused_by_name(tokenizer: Tokenizer) -> None:
    @slowly
    @given(arrays())
    def holds(column: Any) -> None:
        with TemporaryDirectory() as folder:
            try:
                check(run(Path(folder), tokenizer, {"prompt": list("abcd"), "x": column}))
            except UserError as error:
                assert "'x'" in str(error)
            else:
                assert_kept(Path(folder))

    holds()


def assert_kept(folder: Path) -> None:
    """Compare the column before and after as Parquet readers see it."""
    before, after = (pq.read_table(next((folder / name).glob("*.parquet")))["x"] for name in ("in", "out"))
    if "Invalid UTF8" in _mistake(before):
        assert "Invalid UTF8" not in _mistake(after)
        return
    shown = [str(_or_error(one)) for one in (before, after)]
    assert shown[0] == shown[1]


def _mistake(column: Any) -> str:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return ""


def _or_error(column: Any) -> list[Any]:
    found = []
    for cell in column:
        try:
            found.append(cell.as_py())
        except Exception as error:
            found.append(type(error))
    return found


def test_columns_of_a_template_of_any_type(tokenizer: Tokenizer) -> None:
    @slowly
    @given(arrays(1))
    def holds(column: Any) -> None:
        with TemporaryDirectory() as folder:
            try:
                rows = run(Path(folder), tokenizer, {"x": column}, template={"prompt": "Say {x}"})
            except UserError as error:
                assert "column 'x' (template.prompt) must be text or a number" in str(error)
            else:
                check(rows, "x")

    holds()


@pytest.mark.parametrize(("kind", "values"), [("prompt", texts()), ("messages", chats()), ("token_ids", id_lists())])
def test_inputs_of_any_value(tokenizer: Tokenizer, kind: str, values: st.SearchStrategy[Any]) -> None:
    @slowly
    @given(values)
    def holds(column: Any) -> None:
        with TemporaryDirectory() as folder:
            check(run(Path(folder), tokenizer, {"x": column}, input={kind: "x"}), "x")

    holds()


@pytest.mark.parametrize(
    "field", ["max_tokens", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "logit_bias"]
)
def test_sampling_columns_of_any_value(tokenizer: Tokenizer, field: str) -> None:
    values = {"stop": text_lists(), "stop_token_ids": id_lists()}.get(field, arrays(1))

    @slowly
    @given(values)
    def holds(column: Any) -> None:
        with TemporaryDirectory() as folder:
            try:
                columns = {"prompt": list("abcd"), "x": column}
                rows = run(Path(folder), tokenizer, columns, sampling={"columns": {field: "x"}})
            except UserError as error:
                assert f"column 'x' (sampling.columns.{field}) must be" in str(error)
            else:
                check(rows, "x")

    holds()


@pytest.mark.parametrize(
    ("column", "code", "message"),
    [
        (pa.array([1, 3_000_000], pa.int32()).view(pa.date32()), "bad_value", "date32[day] 3000000 cannot be read: "),
        (
            pa.array([1, 86_400_000], pa.int32()).view(pa.time32("ms")),
            "bad_value",
            "time32[ms] 86400000 cannot be read: ",
        ),
        (
            pa.array([1, 2**62], pa.int64()).view(pa.timestamp("us")),
            "bad_value",
            "timestamp[us] 4611686018427387904 cann",
        ),
        (
            pa.array([1, -(2**62)], pa.int64()).view(pa.timestamp("us")),
            "bad_value",
            "timestamp[us] -4611686018427387904",
        ),
        (
            pa.array([1, 2**62], pa.int64()).view(pa.duration("ms")),
            "bad_value",
            "duration[ms] 4611686018427387904 cann",
        ),
        (text_of([b"fine", b"caf\xe9"], pa.string()), "bad_utf8", "column 'x' is not valid UTF-8: "),
    ],
)
def test_a_value_without_a_text_is_an_error_row(
    tmp_path: Path, tokenizer: Tokenizer, column: Any, code: str, message: str
) -> None:
    columns = {"x": pa.concat_arrays([column, column])}
    rows = run(tmp_path, tokenizer, columns, template={"prompt": "On {x}"}, output={"keep": "none"})
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, code] * 2
    assert rows[1]["error"]["message"].startswith("column 'x'") and message in rows[1]["error"]["message"]


def test_a_value_inside_a_chat_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    at = pa.array([1, 2**62], pa.int64()).view(pa.timestamp("us"))
    messages = pa.StructArray.from_arrays(
        [pa.array(["user"] * 2), pa.array(["Add 1 and 2."] * 2), at], ["role", "content", "at"]
    )
    chat = pa.ListArray.from_arrays([0, 1, 2, 2, 2], messages, mask=pa.array([False, False, False, True]))
    rows = run(tmp_path, tokenizer, {"x": chat}, input={"messages": "x"})
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, "bad_value", "bad_messages", "null_input"]
    assert "column 'x' in this row: timestamp[us] 4611686018427387904 cannot be read: " in rows[1]["error"]["message"]


def test_sparks_dates_of_the_year_9999_stay_what_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    last = 253370764800000000  # 9999-01-01 in microseconds; in nanoseconds, as Arrow reads INT96, it is 1816
    table = pa.table({"x": pa.array([0, last] * 2, pa.int64()).view(pa.timestamp("us"))})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet", use_deprecated_int96_timestamps=True)
    files = read_input(make_spec(tmp_path, template={"prompt": "On {x}"}))
    reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
    assert reader.read(Slice("a.parquet", 0, 4))["x"].to_pylist()[1].year == 9999


def test_nanoseconds_are_not_cut_without_a_word(tmp_path: Path) -> None:
    """Only INT96 is read in microseconds; what Arrow stores as INT64 keeps its nanoseconds."""
    at = pa.array([1, 1_700_000_000_123_456_789], pa.timestamp("ns"))
    table = pa.table({"prompt": ["a", "b"], "at": at, "in": pa.array([{"at": v} for v in at.to_pylist()])})
    spec = make_spec(tmp_path)
    for is_int96 in (True, False):
        write_input(tmp_path / "in/a.parquet", table, use_deprecated_int96_timestamps=is_int96)
        files = read_input(spec)
        reader = ShardReader(fs.LocalFileSystem(), files.root, files.read_columns, files.output_schema)
        read = reader.read(Slice("a.parquet", 0, 2))["at"]
        assert (read.combine_chunks() == at) is not is_int96
        warned = [name for name in ("at", "in") if any(f"column {name!r} has timestamps" in w for w in files.warnings)]
        assert warned == (["at", "in"] if is_int96 else [])
    without = make_spec(tmp_path, output={"keep": "none"})
    write_input(tmp_path / "in/a.parquet", table, use_deprecated_int96_timestamps=True)
    assert read_input(without).warnings == ()  # nobody reads them
    table = table.replace_schema_metadata({"org.apache.spark.version": "3.5.0"})
    write_input(tmp_path / "in/a.parquet", table, use_deprecated_int96_timestamps=True)
    assert read_input(spec).warnings == ()


def test_duckdbs_json_is_text_and_stays_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    column = pa.array([json.dumps(f"Add {i} and 3.") for i in range(ROWS)], pa.json_())
    rows = run(tmp_path, tokenizer, {"prompt": column})
    assert [row["num_prompt_tokens"] for row in rows] == [len(tokenizer.encode_prompt('"Add 0 and 3."'))] * ROWS
    assert pq.read_schema(tmp_path / "out/part-x.parquet").field("prompt").type == pa.json_()


def test_types_of_python_packages_are_kept_by_their_storage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Periods and intervals of pandas, written by a process without pandas and read by one with it."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            "prompt": list("abcd"),
            "month": pd.period_range("2020-01", periods=ROWS, freq="M"),
            "span": pd.interval_range(0, ROWS),
        }
    )
    (tmp_path / "in").mkdir()
    frame.to_parquet(tmp_path / "in/a.parquet")
    run(tmp_path, tokenizer, _columns(tmp_path))
    there = pd.read_parquet(tmp_path / "out/part-x.parquet")
    assert list(there["month"]) == list(frame["month"]) and list(there["span"]) == list(frame["span"])
    with pytest.raises(
        UserError, match=r"column 'month' \(template.prompt\) must be text or a number, is pandas.period"
    ):
        read_input(make_spec(tmp_path, template={"prompt": "In {month}"}))


def _columns(folder: Path) -> dict[str, Any]:
    table = pq.read_table(folder / "in/a.parquet")
    return {name: table[name] for name in table.column_names}
