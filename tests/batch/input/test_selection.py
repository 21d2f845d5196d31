"""Which rows a job has by input.where, sample and limit; the same in every run, and read as they are."""

import datetime as dt
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from engineless_job import run_engineless
from made_jobs import damage, make_spec, read_output, write_input

from moray.batch.input import read_input
from moray.batch.input.reader import ShardReader
from moray.batch.output.failed_rows import find_failed
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import find_committed
from moray.batch.output.verify import verify
from moray.batch.plan.planner import plan_job
from moray.batch.shards import Plan, Slice
from moray.engine.errors import InputError

ROWS = [
    {"prompt": f"p{i}", "n": None if i % 10 == 9 else i, "lang": ("en", "de", "fr")[i % 3], "ok": i % 2 == 0}
    for i in range(100)
]


def selected(folder: Path, **source: Any) -> dict[str, list[int]]:
    files = read_input(make_spec(folder, input=source))
    return {path: list(rows) for path, rows in files.rows}


@pytest.fixture(params=["parquet", "jsonl"])
def rows(request: Any, tmp_path: Path) -> Path:
    if request.param == "parquet":
        write_input(tmp_path / "in/a", pa.Table.from_pylist(ROWS), row_group_size=30)
        (tmp_path / "in/a").rename(tmp_path / "in/a.parquet")
    else:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        ("n >= 90", lambda row: row["n"] is not None and row["n"] >= 90),
        ("lang == 'en' and not ok", lambda row: row["lang"] == "en" and not row["ok"]),
        ("n is null", lambda row: row["n"] is None),
        ("not n < 50", lambda row: row["n"] is not None and row["n"] >= 50),
        ("n not in [1, 2, 3]", lambda row: row["n"] not in (None, 1, 2, 3)),
        ("lang in ['en', 'xx'] or n == 4", lambda row: row["lang"] == "en" or row["n"] == 4),
        ("10 < n < 12.5", lambda row: row["n"] in (11, 12)),
        ("ok and n != 4", lambda row: row["ok"] and row["n"] not in (None, 4)),
        ("n in []", lambda row: False),
    ],
)
def test_rows_that_meet_a_condition(rows: Path, where: str, meets: Any) -> None:
    ((_, found),) = selected(rows, where=where).items()
    assert found == [i for i, row in enumerate(ROWS) if meets(row)]


def test_a_job_over_some_rows_closes(rows: Path) -> None:
    """Its parts hold these rows and no others, with their own numbers and random streams; verify counts them."""
    spec = make_spec(rows, input={"where": "lang == 'de' and n > 3", "sample": 20, "limit": 18})
    job = run_engineless(spec)
    assert job.plan.num_rows == 18
    assert Plan.from_json(job.plan.to_json()) == job.plan == plan_job(spec).plan
    found = read_output(rows)
    assert [row["prompt"] for row in found] == [f"p{row['source_row']}" for row in found]
    assert all(row["lang"] == "de" for row in found) and len(found) == 18
    assert verify(str(rows / "out")).closes
    assert "the job has 18 of the 100 rows of its files, by input.where and input.sample and input.limit" in (
        job.plan.warnings
    )
    committed = find_committed(OutputFolder(str(rows / "out")), job.plan)
    assert find_failed(OutputFolder(str(rows / "out")), job.plan, committed, ()) == {}


def test_sample_and_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_input(tmp_path / f"in/{name}.parquet", {"prompt": [name] * 50})
    assert selected(tmp_path, limit=60) == {"a.parquet": list(range(50)), "b.parquet": list(range(10))}
    assert selected(tmp_path, limit=7) == {"a.parquet": list(range(7)), "b.parquet": []}
    one, again, other = (selected(tmp_path, sample="20%", sample_seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    assert sum(map(len, one.values())) == 20 and all(rows == sorted(set(rows)) for rows in one.values())
    assert selected(tmp_path, sample=1000) == selected(tmp_path)
    assert sum(map(len, selected(tmp_path, sample="0.1%").values())) == 1


def test_conditions_on_the_names_of_folders_read_no_file(tmp_path: Path) -> None:
    for day in ("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__"):
        write_input(tmp_path / f"in/day={day}/a.parquet", {"prompt": ["a"] * 10, "n": range(10)})
        damage(tmp_path / f"in/day={day}/a.parquet", 0, 0)
        damage(tmp_path / f"in/day={day}/a.parquet", 0, 1)
    found = selected(tmp_path, where="day >= '2024-01-02'")
    assert {path: len(rows) for path, rows in found.items()} == {
        "day=2024-01-01/a.parquet": 0,
        "day=2024-01-02/a.parquet": 10,
        "day=__HIVE_DEFAULT_PARTITION__/a.parquet": 0,
    }
    assert sum(map(len, selected(tmp_path, where="day is null").values())) == 10
    write_input(tmp_path / "in/day=2024-01-02/a.parquet", {"prompt": ["a"] * 10, "n": range(10)})
    assert sum(map(len, selected(tmp_path, where="day == '2024-01-02' and n > 7").values())) == 2


def test_row_groups_that_cannot_meet_it_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "in/a.parquet"
    write_input(path, {"prompt": ["a"] * 100, "n": range(100)}, row_group_size=20)
    damage(path, 1, 1)
    assert selected(tmp_path, where="n >= 70") == {"a.parquet": list(range(70, 100))}
    with pytest.raises(InputError, match=r"a\.parquet: input\.where: "):
        selected(tmp_path, where="n >= 30")


def test_a_limit_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_input(tmp_path / f"in/{name}.parquet", {"prompt": ["a"] * 20_000, "n": [1] * 20_000})
    damage(tmp_path / "in/b.parquet", 0, 1)
    assert selected(tmp_path, where="n == 1", limit=15) == {"a.parquet": list(range(15)), "b.parquet": []}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()])
def test_text_in_any_layout(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["x", "y", None, "y"]).cast(kind)
    write_input(tmp_path / "in/a.parquet", {"prompt": list("abcd"), "lang": column}, row_group_size=2)
    assert selected(tmp_path, where="lang == 'y'") == {"a.parquet": [1, 3]}
    assert selected(tmp_path, where="lang in ['x', 'z']") == {"a.parquet": [0]}


def test_a_line_that_is_no_json_stays_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"prompt": "a", "n": 1}\n{\n{"prompt": "b"}\n{"prompt": "c", "n": 2}')
    assert selected(tmp_path, where="n == 2") == {"a.jsonl": [1, 3]}
    run_engineless(make_spec(tmp_path, input={"where": "n == 2"}))
    assert [row["error"] and row["error"]["code"] for row in read_output(tmp_path)] == ["invalid_json", None]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lng == 'en'", "input.where: unknown column 'lng'; did you mean 'lang'?"),
        ("lang > 5", "a.parquet: input.where: column 'lang' is string, and is compared with 5"),
        ("n == 'x'", "a.parquet: input.where: column 'n' is int64, and is compared with 'x'"),
        ("n in [1, 'x']", "a.parquet: input.where: column 'n' is int64, and is compared with 'x'"),
        ("lang == n", "a.parquet: input.where: Function 'equal' has no kernel matching input types (string, int64)"),
        ("n", "a.parquet: input.where: is int64, not true or false"),
        ("tags == 'x'", "a.parquet: input.where: column 'tags' has lists, maps or mixed values"),
        ("at > 'yesterday'", "a.parquet: input.where: 'yesterday' is no timestamp[us]: "),
    ],
)
def test_conditions_that_do_not_fit_the_columns(tmp_path: Path, where: str, message: str) -> None:
    columns = {"lang": ["x"], "n": [1], "tags": [["x"]], "at": pa.array([0], pa.timestamp("us"))}
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]} | columns)
    with pytest.raises(InputError) as error:
        selected(tmp_path, where=where)
    assert str(error.value).startswith(message)


def test_dates_decimals_and_columns_that_some_files_lack(tmp_path: Path) -> None:
    at = pa.array([dt.datetime(2024, 1, day) for day in (1, 2, 3)], pa.timestamp("ns", "UTC"))
    columns = {"at": at, "day": at.cast(pa.date32()), "price": [Decimal("1.50"), Decimal("2.5"), None]}
    write_input(tmp_path / "in/a.parquet", {"prompt": list("abc")} | columns)
    write_input(tmp_path / "in/b.parquet", {"prompt": ["a"]})
    assert selected(tmp_path, where="day >= '2024-01-02'") == {"a.parquet": [1, 2], "b.parquet": []}
    assert selected(tmp_path, where="at < '2024-01-01T12:00:00Z' or price == 2.5")["a.parquet"] == [0, 1]
    assert selected(tmp_path, where="price is null") == {"a.parquet": [2], "b.parquet": [0]}


@pytest.mark.parametrize("count", [1, 2, 60, 3_000])
def test_any_rows_of_a_file_are_read(tmp_path: Path, count: int) -> None:
    write_input(tmp_path / "in/a.parquet", {"row": range(10_000)}, row_group_size=1_500)
    (tmp_path / "in/b.jsonl").write_text("".join(f'{{"row": {i}}}\n' for i in range(10_000)))
    wanted = sorted(random.Random(count).sample(range(10_000), count))
    for name in ("a.parquet", "b.jsonl"):
        spec = make_spec(tmp_path, input={"path": str(tmp_path / "in" / name)}, template={"prompt": "{row}"})
        files = read_input(spec)
        reader = ShardReader(files.filesystem, files.root, ["row"], files.output_schema, files.layout)
        (piece,) = files.place([Slice.of_rows(name, wanted)])
        assert list(piece.rows) == wanted and Slice.from_json(json.loads(json.dumps(piece.to_json()))) == piece
        assert reader.read(piece)["row"].to_pylist() == wanted
        assert [row for part in reader.split(piece) for row in part.rows] == wanted


def test_conditions_as_arrow_evaluates_them(rows: Path) -> None:
    """Beside the same filter written for Arrow's own data sets."""
    theirs = ds.dataset(pa.Table.from_pylist(ROWS)).filter((ds.field("n") > 20) & (ds.field("lang") != "en"))
    ((_, found),) = selected(rows, where="n > 20 and lang != 'en'").items()
    assert [ROWS[i]["prompt"] for i in found] == theirs.to_table()["prompt"].to_pylist()
