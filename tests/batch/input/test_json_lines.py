"""Files of JSON lines: what the plan finds in them, and that any slice gives its rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import make_spec
from pyarrow import fs

from moray.batch.input import InputFiles, line_file, lines, read_input
from moray.batch.input import files as input_files
from moray.batch.input.line_rows import read_errors
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Slice
from moray.engine.errors import InputError

CODECS = ("", ".gz", ".zst")


def write(path: Path, *rows: Any, codec: str = "") -> None:
    """Write rows as lines; text is a line as it is."""
    content = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.with_name(path.name + codec).write_bytes(compress[codec](content))


def read(folder: Path, **sections: Any) -> InputFiles:
    return read_input(make_spec(folder, **sections))


def reader(files: InputFiles) -> ShardReader:
    rows = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema, files.layout)
    rows.expect({file.path: file.identity for file in files.files})
    return rows


def refusal(folder: Path, **sections: Any) -> str:
    with pytest.raises(InputError) as error:
        read(folder, **sections)
    return str(error.value)


@pytest.mark.parametrize("codec", CODECS)
def test_any_slice_has_its_rows(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks that cut lines anywhere."""
    monkeypatch.setattr(lines, "CHUNK_BYTES", 100)
    monkeypatch.setattr(line_file, "CHUNK_BYTES", 100)
    rows = [{"prompt": f"p{i}" * (i % 40), "id": i} for i in range(300)]
    write(tmp_path / "in/a.jsonl", *rows, codec=codec)
    files = read(tmp_path)
    assert (files.num_rows, files.format) == (300, "jsonl")
    one = reader(files)
    for first, count in ((0, 10), (10, 100), (250, 50), (130, 3), (64, 64), (299, 1), (0, 300)):
        (piece,) = files.place([Slice(f"a.jsonl{codec}", first, count)])
        assert (piece.anchor is None) == bool(codec)
        assert one.read(piece).to_pylist() == rows[first : first + count]
        assert one.read(Slice(piece.file, first, count)).to_pylist() == rows[first : first + count]


def test_only_the_lines_from_the_anchor_on_are_read(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", *({"prompt": "x" * 1000, "id": i} for i in range(2000)))
    files = read(tmp_path)
    (piece,) = files.place([Slice("a.jsonl", 1900, 1)])
    assert piece.anchor is not None and piece.anchor[0] == 1856
    content = bytearray((tmp_path / "in/a.jsonl").read_bytes())
    assert content[piece.anchor[1] :].startswith(b'{"prompt"')
    assert reader(files).read(piece)["id"].to_pylist() == [1900]


def test_types_are_those_of_all_rows_of_all_files(tmp_path: Path) -> None:
    write(
        tmp_path / "in/1.jsonl",
        {"prompt": "a", "whole": 1, "flag": True, "number": 1, "mixed": 1, "big": 2**60, "none": None, "list": [1]},
        {"prompt": "b", "whole": None, "number": 2.5, "mixed": "x", "big": 0.5, "huge": 2**70},
    )
    write(tmp_path / "in/2.ndjson", {"prompt": "c", "whole": 2**60, "number": 3, "map": {"a": None}, "list": "x"})
    files = read(tmp_path)
    kinds = {name: str(files.output_schema.field(name).type) for name in files.kept_columns}
    assert kinds == {
        "prompt": "string",
        "whole": "int64",
        "flag": "bool",
        "number": "double",
        "mixed": "string",
        "big": "string",
        "none": "null",
        "list": "string",
        "huge": "string",
        "map": "string",
    }
    one, two = reader(files).read(Slice("1.jsonl", 0, 2)), reader(files).read(Slice("2.ndjson", 0, 1))
    assert one.to_pylist() == [
        {"prompt": "a", "whole": 1, "flag": True, "number": 1.0, "mixed": "1", "big": str(2**60), "none": None}
        | {"list": "[1]", "huge": None, "map": None},
        {"prompt": "b", "whole": None, "flag": None, "number": 2.5, "mixed": '"x"', "big": "0.5", "none": None}
        | {"list": None, "huge": str(2**70), "map": None},
    ]
    assert two.to_pylist()[0]["list"] == '"x"' and two.to_pylist()[0]["map"] == '{"a":null}'
    assert [line.partition(" is in")[0] for line in files.warnings] == [
        f"column {name!r}" for name in ("flag", "mixed", "big", "none", "huge", "map")
    ]


def test_a_bad_line_is_a_row_with_an_error(tmp_path: Path) -> None:
    bad = [b'{"prompt": "x"', b"5", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}']
    write(tmp_path / "in/a.jsonl", {"prompt": "a"}, *bad, {"prompt": "b"})
    files = read(tmp_path)
    table = reader(files).read(Slice("a.jsonl", 0, 7))
    assert table["prompt"].to_pylist() == ["a", None, None, None, None, None, "b"]
    errors = read_errors(table)
    assert list(errors) == [1, 2, 3, 4, 5]
    assert errors[1] == "row 1 of a.jsonl is not valid JSON: EOF while parsing an object at line 1 column 14"
    assert errors[2].endswith("must be a JSON object with the row's columns, is a whole")


def test_a_byte_order_mark_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xe2\x80\xa8b"}\r\n\n\n{"prompt": "c"}'
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(content)
    files = read(tmp_path)
    assert files.num_rows == 3
    assert reader(files).read(Slice("a.jsonl", 0, 3))["prompt"].to_pylist() == ["a", "\u2028b", "c"]


def test_a_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl")
    write(tmp_path / "in/b.jsonl.gz", codec="")
    write(tmp_path / "in/c.jsonl", b"{")
    (tmp_path / "in/c.jsonl").write_bytes(b'{"prompt": "x"}')
    assert read(tmp_path).num_rows == 1
    for name in ("b.jsonl.gz", "c.jsonl"):
        (tmp_path / "in" / name).unlink()
    assert (read(tmp_path).num_rows, read(tmp_path).kept_columns) == (0, ())


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_that_was_changed_since_the_plan(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"in/a.jsonl{codec}"
    write(tmp_path / "in/a.jsonl", *({"prompt": f"{i:05}"} for i in range(100)), codec=codec)
    files = read(tmp_path)
    rows = reader(files)
    before = path.read_bytes()
    write(tmp_path / "in/a.jsonl", *({"prompt": f"{i:05}"} for i in range(1, 101)), codec=codec)
    with pytest.raises(InputError, match="is not the file that was planned: it has been changed since"):
        rows.read(Slice(path.name, 0, 5))
    assert read(tmp_path).files[0].identity != files.files[0].identity
    path.write_bytes(before)
    assert rows.read(Slice(path.name, 0, 1))["prompt"].to_pylist() == ["00000"]
    path.unlink()
    with pytest.raises(InputError, match="is not there any more"):
        rows.read(Slice(path.name, 5, 5))


def test_one_changed_byte_gives_another_identity(tmp_path: Path) -> None:
    """Wherever it is; the samples of a large file are only for readers."""
    path = tmp_path / "in/a.jsonl"
    write(path, *({"prompt": "x" * 100} for _ in range(2000)))
    before = read(tmp_path).files[0].identity
    content = bytearray(path.read_bytes())
    content[content.index(b"x", 50_001)] = ord("y")
    path.write_bytes(content)
    assert read(tmp_path).files[0].identity != before


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short(tmp_path: Path, codec: str) -> None:
    write(tmp_path / "in/a.jsonl", *({"prompt": f"{i}"} for i in range(1000)), codec=codec)
    path = tmp_path / f"in/a.jsonl{codec}"
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(tmp_path).startswith(f"a.jsonl{codec}: Truncated compressed stream")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": "a"}]', "begins with a list; one JSON object a line is needed: jq -c '.[]' FILE > FILE.jsonl"),
        (b'{\n  "prompt": "a"\n}', "has rows of several lines each; one JSON object a line is needed: jq -c '.' FILE"),
    ],
)
def test_json_that_is_not_lines(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(content)
    assert refusal(tmp_path).startswith(f"a.jsonl: {message}")


def test_a_line_without_an_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 3 << 20)
    write(tmp_path / "in/a.jsonl", {"prompt": "x" * (5 << 20)})
    assert refusal(tmp_path) == "a.jsonl: has a line of more than 3,145,728 bytes at byte 0; is it JSON Lines?"


def test_too_many_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "MAX_COLUMNS", 100)
    write(tmp_path / "in/a.jsonl", *({"prompt": "x", f"k{i}": i} for i in range(1000)))
    assert "different keys or more, 100 are allowed as columns" in refusal(tmp_path)
    assert read(tmp_path, output={"keep": ["prompt"]}).kept_columns == ("prompt",)


def test_columns_that_the_job_names(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", {"prompt": 5, "t": 0.5})
    write(tmp_path / "in/b.jsonl", {"prompt": 6})
    sampling = {"columns": {"temperature": "t", "seed": "seed"}}
    assert refusal(tmp_path, sampling=sampling).split("\n") == [
        "a.jsonl: column 'prompt' (input.prompt) must be text, is int64",
        "a.jsonl: has no column 'seed' (sampling.columns.seed); known: prompt, t",
        "b.jsonl: column 'prompt' (input.prompt) must be text, is int64",
        "b.jsonl: has no column 'seed' (sampling.columns.seed); known: prompt",
    ]
    write(tmp_path / "in/a.jsonl", {"prompt": ["x"]}, {"prompt": {}})
    (tmp_path / "in/b.jsonl").unlink()
    assert refusal(tmp_path) == "a.jsonl: column 'prompt' (input.prompt) must be text, is JSON (list, map)"
    write(tmp_path / "in/b.jsonl", {"text": "x"})
    write(tmp_path / "in/a.jsonl", {"prompt": "x"})
    assert refusal(tmp_path) == "b.jsonl: has no column 'prompt' (input.prompt); known: text"


def test_formats(tmp_path: Path) -> None:
    write(tmp_path / "in/a.jsonl", {"prompt": "x"})
    write(tmp_path / "in/b.JSON.gz", {"prompt": "x"})
    (tmp_path / "in/c.csv").write_text("x")
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "in/d.parquet")
    both = (
        "the files are of two formats, jsonl (a.jsonl) and parquet (d.parquet); set input.format to read those of one"
    )
    assert refusal(tmp_path) == both

    def names(**source: Any) -> list[str]:
        return [file.path for file in read(tmp_path, input=source).files]

    assert names(format="parquet") == ["d.parquet"]
    assert names(format="jsonl") == ["a.jsonl", "b.JSON.gz"]
    (tmp_path / "in/e.txt").write_text('{"prompt": "x"}')
    assert names(path=str(tmp_path / "in/e.txt"), format="jsonl") == ["e.txt"]
    assert read(tmp_path, input={"format": "jsonl"}).warnings == (
        "3 files left out, not named *.jsonl, *.ndjson or *.json: c.csv, d.parquet, e.txt",
    )
    line = "convert it: duckdb -c \"COPY (FROM read_csv('c.csv')) TO 'c.parquet'\""
    assert refusal(tmp_path, input={"path": str(tmp_path / "in/c.csv")}).endswith(f"c.csv: CSV is not read; {line}")
    assert refusal(tmp_path, input={"path": str(tmp_path / "in/*.csv")}).endswith(
        f"there is c.csv. CSV is not read; {line}"
    )
    assert refusal(tmp_path, input={"path": str(tmp_path / "in/b.JSON.gz")}).endswith(
        "b.JSON.gz: set input.format: jsonl if the file has one JSON object a line"
    )


def test_the_duckdb_line_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("prompt,id\nCAT reversed is,1\n")
    text = refusal(tmp_path, input={"path": "in.csv"})
    duckdb.sql(text.split('duckdb -c "')[1].removesuffix('"'))
    assert read(tmp_path, input={"path": "in.parquet"}).num_rows == 1


def test_an_object_store(s3: Any, bucket: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "id": i} for i in range(500)]
    for codec in CODECS:
        write(tmp_path / "a.jsonl", *rows, codec=codec)
        s3.put_object(Bucket=bucket, Key=f"in/a.jsonl{codec}", Body=(tmp_path / f"a.jsonl{codec}").read_bytes())
    files = read(tmp_path, input={"path": f"s3://{bucket}/in"})
    assert [file.num_rows for file in files.files] == [500] * 3
    rows_of = reader(files)
    for file in files.files:
        (piece,) = files.place([Slice(file.path, 333, 50)])
        assert rows_of.read(piece).to_pylist() == rows[333:383]
    assert not isinstance(files.filesystem, fs.LocalFileSystem)


def test_much_to_read_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in/a.jsonl", {"prompt": "x"})
    read(tmp_path)
    assert caplog.messages == []
    monkeypatch.setattr(input_files, "_MUCH_BYTES", 10)
    read(tmp_path)
    assert caplog.messages == ["reading 16 B of JSON lines, to find rows and types; this takes a while"]
