"""Folders of table formats hold files that are no part of the table any more: refused, with what to do instead."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import make_spec, write_input

from moray.batch.input import read_input
from moray.engine.errors import InputError

MARKS = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Hudi": ".hoodie/hoodie.properties",
    "Iceberg": "metadata/v1.metadata.json",
}
FIXES = {"Delta": ".file_uris() returns them", "Hudi": 'format("hudi")', "Iceberg": "iceberg_scan('"}


def refused(folder: Path, path: str) -> str:
    with pytest.raises(InputError) as error:
        read_input(make_spec(folder, input={"path": path}))
    return str(error.value)


@pytest.mark.parametrize("kind", MARKS)
def test_tables_are_refused_wherever_they_are_met(tmp_path: Path, kind: str) -> None:
    table = tmp_path / "all/table"
    (table / MARKS[kind]).parent.mkdir(parents=True)
    (table / MARKS[kind]).write_text("{}")
    for part in ("a.parquet", "data/b.parquet", "day=1/hour=2/c.parquet"):
        write_input(table / part, {"prompt": ["a"]})
    for path in ("all", "all/*", "all/table", "all/table/*.parquet", "all/**/*.parquet", "all/table/data"):
        message = refused(tmp_path, str(tmp_path / path))
        assert (
            message.startswith(f"{table}: is a table of {kind}: its folder also holds files") and FIXES[kind] in message
        )
    assert refused(tmp_path, str(table / "day=1/hour=2")).startswith(f"{table}: is a table of {kind}")
    files = read_input(make_spec(tmp_path, input={"path": [str(table / "a.parquet"), str(table / "data/b.parquet")]}))
    assert files.num_rows == 2, "files named in full are what the fix gives"


@pytest.mark.parametrize("kind", MARKS)
def test_tables_on_an_object_store(s3: Any, bucket: str, tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    s3.put_object(Bucket=bucket, Key=f"{kind}/table/{MARKS[kind]}", Body=b"{}")
    s3.put_object(Bucket=bucket, Key=f"{kind}/table/day=1/a.parquet", Body=(tmp_path / "a.parquet").read_bytes())
    for path in ("", "/table", "/table/day=1", "/table/*/*.parquet", "/*/day=1"):
        message = refused(tmp_path, f"s3://{bucket}/{kind}{path}")
        assert message.startswith(f"s3://{bucket}/{kind}/table: is a table of {kind}")


def test_a_folder_of_ones_own_named_metadata(tmp_path: Path) -> None:
    write_input(tmp_path / "in/metadata/a.parquet", {"prompt": ["a"]})
    write_input(tmp_path / "in/data/b.parquet", {"prompt": ["a"]})
    (tmp_path / "metadata").write_text("x")
    assert read_input(make_spec(tmp_path)).num_rows == 2
    assert read_input(make_spec(tmp_path, input={"path": str(tmp_path / "in/data")})).num_rows == 1


def test_files_that_a_pattern_leaves_out_are_named(tmp_path: Path) -> None:
    for name in ("a-1.parquet", "a-2.PARQUET", "b.pq", "sub/a-3.parquet", "_old.parquet"):
        write_input(tmp_path / f"in/{name}", {"prompt": ["a"]})
    (tmp_path / "in/notes.txt").write_text("x")

    def warnings(*globs: str) -> tuple[str, ...]:
        return read_input(make_spec(tmp_path, input={"path": [str(tmp_path / g) for g in globs]})).warnings

    said = "beside those that the pattern finds, which it leaves out:"
    assert warnings("in/*.parquet") == (f"2 files {said} a-2.PARQUET, b.pq",)
    assert warnings("in/*.parquet", "in/b.pq") == (f"1 file {said} a-2.PARQUET",)
    assert warnings("in/**/*.parquet") == (f"2 files {said} a-2.PARQUET, b.pq",)
    assert warnings("in/*1.parquet", "in/*[qT]") == ()
