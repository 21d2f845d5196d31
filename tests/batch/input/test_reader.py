"""ShardReader over any layout of Parquet, in any order of slices."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import damage
from pyarrow import fs

from moray.batch.input.footer import read_footer
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Slice
from moray.engine.errors import InputError

LOCAL = fs.LocalFileSystem()


def write(path: Path, num_rows: int, row_group_size: int = 1000, **columns: pa.Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pa.array([f"{path.stem}-{i}" for i in range(num_rows)])
    pq.write_table(pa.table({"text": texts, "row": pa.array(range(num_rows))} | columns), path, row_group_size)


def reader(root: Path, *columns: str, schema: pa.Schema | None = None) -> ShardReader:
    return ShardReader(LOCAL, str(root), columns, schema or pa.schema([]))


@pytest.mark.parametrize("row_group_size", [1, 7, 1000, 5000])
def test_slices_in_order_have_their_rows(tmp_path: Path, row_group_size: int) -> None:
    write(tmp_path / "a.parquet", 2500, row_group_size)
    rows = reader(tmp_path, "text", "row")
    got = [rows.read(Slice("a.parquet", first, min(300, 2500 - first))) for first in range(0, 2500, 300)]
    assert pa.concat_tables(got)["row"].to_pylist() == list(range(2500))
    assert [table.num_rows for table in got] == [300] * 8 + [100]


@pytest.mark.parametrize("first", [[0, 50, 20], [90, 0], [33, 33], [10, 60, 99]])
def test_slices_in_any_order_have_their_rows(tmp_path: Path, first: list[int]) -> None:
    write(tmp_path / "sub/a.parquet", 100, 30)
    rows = reader(tmp_path, "row")
    for row in first:
        assert rows.read(Slice("sub/a.parquet", row, 1))["row"].to_pylist() == [row]


def test_a_file_is_opened_once_for_slices_that_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", 1000)
    opened = []
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, _open=pq.ParquetFile, **k: (opened.append(1), _open(*a, **k))[1])
    rows = reader(tmp_path, "row")
    for first in range(0, 1000, 100):
        rows.read(Slice("a.parquet", first, 50))
    assert len(opened) == 1
    rows.read(Slice("a.parquet", 0, 50))
    assert len(opened) == 2


def test_columns_take_the_types_of_the_schema_or_plain_ones(tmp_path: Path) -> None:
    texts = ["x", None, "y"]
    columns = {
        "dict": pa.array(texts).dictionary_encode(),
        "large": pa.array(texts, pa.large_string()),
        "empty": pa.nulls(3),
        "list": pa.array([["x"], None, []], pa.large_list(pa.large_string())),
    }
    write(tmp_path / "a.parquet", 3, **columns)
    schema = pa.schema([("dict", pa.string()), ("empty", pa.string()), ("not_read", pa.int8())])
    table = reader(tmp_path, "list", "dict", "large", "empty", schema=schema).read(Slice("a.parquet", 0, 3))
    assert table.schema == pa.schema(
        [("list", pa.list_(pa.string())), ("dict", pa.string()), ("large", pa.string()), ("empty", pa.string())]
    )
    assert table["dict"].to_pylist() == table["large"].to_pylist() == texts
    assert table["list"].to_pylist() == [["x"], None, []]


def test_a_column_with_a_dot_in_its_name(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2, **{"text.en": pa.array(["x", "y"])})
    rows = reader(tmp_path, "text", "text.en")
    assert rows.read(Slice("a.parquet", 1, 1)).to_pylist() == [{"text": "a-1", "text.en": "y"}]


def test_a_file_that_is_gone_or_shorter_than_planned(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 10)
    with pytest.raises(InputError, match=r"b\.parquet: is not there any more"):
        reader(tmp_path, "row").read(Slice("b.parquet", 0, 1))
    with pytest.raises(InputError, match=r"a\.parquet: ends at row 10; it had 12"):
        reader(tmp_path, "row").read(Slice("a.parquet", 8, 4))


def planned(root: Path) -> dict[str, str]:
    """The identity of a.parquet now."""
    path = root / "a.parquet"
    return {"a.parquet": read_footer(LOCAL, str(path), "a.parquet", path.stat().st_size).identity}


def test_a_file_that_was_changed_since_the_plan(tmp_path: Path) -> None:
    """Before it is read, and between two shards of it; put back, it is the one that was planned."""
    path = tmp_path / "a.parquet"
    write(path, 10)
    rows = reader(tmp_path, "row")
    rows.expect(planned(tmp_path))
    before = path.read_bytes()
    write(path, 10, row=pa.array(range(10, 20)))
    with pytest.raises(InputError, match=r"a\.parquet: is not the file that was planned: it has been changed since"):
        rows.read(Slice("a.parquet", 0, 5))
    path.write_bytes(before)
    assert rows.read(Slice("a.parquet", 0, 5))["row"].to_pylist() == [0, 1, 2, 3, 4]
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: is not the file that was planned: is not a Parquet file"):
        rows.read(Slice("a.parquet", 5, 5))
    path.unlink()
    with pytest.raises(InputError, match=r"a\.parquet: is not there any more"):
        rows.read(Slice("a.parquet", 5, 5))
    path.write_bytes(before)
    assert rows.read(Slice("a.parquet", 5, 5))["row"].to_pylist() == [5, 6, 7, 8, 9]


def test_a_page_that_does_not_fit_its_checksum(tmp_path: Path) -> None:
    """A bit that flipped in data that can be decoded all the same."""
    path = tmp_path / "a.parquet"
    table = pa.table({"row": pa.array(range(100))})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    assert reader(tmp_path, "row").read(Slice("a.parquet", 0, 100))["row"].to_pylist() == list(range(100))
    content = bytearray(path.read_bytes())
    place = content.index((50).to_bytes(8, "little"))
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="checksum"):
        reader(tmp_path, "row").read(Slice("a.parquet", 0, 100))


def test_damaged_data_raise_and_the_rows_beside_them_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 200, 100)
    damage(tmp_path / "a.parquet", row_group=0)
    rows = reader(tmp_path, "text", "row")
    with pytest.raises((OSError, pa.ArrowException)):
        rows.read(Slice("a.parquet", 0, 100))
    assert rows.read(Slice("a.parquet", 100, 100))["row"].to_pylist() == list(range(100, 200))


def test_a_slice_is_split_where_row_groups_end(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 100, 30)
    pieces = reader(tmp_path, "row").split(Slice("a.parquet", 25, 50))
    assert [(piece.first_row, piece.num_rows) for piece in pieces] == [(25, 5), (30, 30), (60, 15)]


def test_row_groups_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 100, 10)
    damage(tmp_path / "a.parquet", row_group=4)
    rows = reader(tmp_path, "text")
    for first in (35, 50, 71, 77, 99):
        assert rows.read(Slice("a.parquet", first, 1))["text"].to_pylist() == [f"a-{first}"]


def test_a_reader_that_is_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 20_000, 20_000)
    before = pa.total_allocated_bytes()
    for _ in range(3):
        reader(tmp_path, "text").read(Slice("a.parquet", 5_000, 1))
    assert pa.total_allocated_bytes() - before < 10_000
