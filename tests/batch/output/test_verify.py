"""verify accepts the output of a job, and nothing else."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import damage

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import PLAN as PLAN_FILE
from moray.batch.output.part import encode_part
from moray.batch.output.part_stats import PartStats, count_part
from moray.batch.output.verify import Verification, verify
from moray.batch.output_columns import ERROR
from moray.batch.shards import Plan, Shard, Slice
from moray.engine.errors import OutputError

PLAN = Plan(
    Fingerprint({"a.parquet": "x", "b.parquet": "y"}, {"task": "generate"}),
    (
        Shard(0, (Slice("a.parquet", 0, 3),)),
        Shard(1, (Slice("a.parquet", 3, 1), Slice("b.parquet", 0, 2))),
        Shard(2, (Slice("b.parquet", 2, 3),)),
    ),
)
SCHEMA = pa.schema(
    [
        pa.field("generated_text", pa.string()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_generated_tokens", pa.int32()),
        pa.field("sample", pa.int32()),
        pa.field("error", ERROR),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
    ]
)


# The rows of a shard: two rows with two samples each, one that failed.
COUNTS = Counts(ok=2, failed=1, prompt_tokens=10, generated_tokens=8, engine_s=1.5, errors={"too_long": 1})


LENGTHS = {"prompt_tokens": Counter({5: 2}), "generated_tokens": Counter({2: 4})}
TALLY = PartStats(Counter(), LENGTHS)


def rows_of(shard: Shard, num_samples: int = 2) -> list[dict[str, Any]]:
    """Return the output rows of a shard: the second row failed, and the other rows have their samples."""
    rows: list[dict[str, Any]] = []
    for piece in shard.slices:
        for row in range(piece.first_row, piece.first_row + piece.num_rows):
            source = {"source_file": piece.file, "source_row": row, "num_prompt_tokens": 5, "num_generated_tokens": 2}
            if {(r["source_file"], r["source_row"]) for r in rows} and not any(r["error"] for r in rows):
                error = {"stage": "tokenize", "code": "too_long", "message": "..."}
                rows.append({"generated_text": None, "sample": 0, "error": error} | source)
            else:
                rows += [{"generated_text": "x", "sample": n, "error": None} | source for n in range(num_samples)]
    return rows


def write(folder: Path, shard: Shard, rows: list[dict[str, Any]] | None = None, **changes: Any) -> None:
    rows = rows_of(shard) if rows is None else rows
    table = pa.Table.from_pylist(rows, schema=changes.get("schema", SCHEMA))
    counts = changes.get("counts", COUNTS)
    fingerprint = changes.get("fingerprint", PLAN.fingerprint.hexdigest)
    stats = changes.get("tally", count_part(table, 0.0, Counter({200: 2}))[1])
    content = encode_part(table, fingerprint, changes.get("index", shard.index), counts, stats, {})
    OutputFolder(str(folder)).write(PLAN.part_name(shard), content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the output folder of a complete job."""
    OutputFolder(str(tmp_path)).write(PLAN_FILE, PLAN.to_json().encode())
    for shard in PLAN.shards:
        write(tmp_path, shard)
    return tmp_path


def one_problem(out: Path) -> str:
    found = verify(str(out))
    assert not found.closes
    (problem,) = found.problems
    return problem


def test_the_books_of_a_whole_job_close(out: Path) -> None:
    assert verify(str(out)) == Verification(
        input_rows=9, shards=3, parts=3, ok=6, failed=3, errors=Counter({"too_long": 3}), problems=[]
    )
    assert verify(str(out)).closes and verify(f"file://{out}").closes


def test_an_unfinished_job_is_right_but_does_not_close(out: Path) -> None:
    (out / PLAN.part_name(PLAN.shards[1])).unlink()
    found = verify(str(out))
    assert (found.closes, found.ok, found.failed, found.pending, found.problems) == (False, 4, 2, 3, [])


def test_a_part_that_was_cut_short(out: Path) -> None:
    part = out / PLAN.part_name(PLAN.shards[0])
    part.write_bytes(part.read_bytes()[:-30])
    assert "cannot be read" in one_problem(out) and verify(str(out)).pending == 3


def test_a_part_whose_data_are_damaged_behind_a_good_footer(out: Path) -> None:
    part = out / PLAN.part_name(PLAN.shards[0])
    damage(part, row_group=0)
    assert pq.read_metadata(part).num_rows == 5
    assert "cannot be read" in one_problem(out) and verify(str(out)).pending == 3


def first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["source_row"] == 0 and row["source_file"] == "a.parquet"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda rows: [r for r in rows if r not in first(rows)],
            "rows of its shard that are missing: 1 (a.parquet row 0)",
        ),
        (lambda rows: rows + first(rows), "rows with samples missing or twice: 1 (a.parquet row 0)"),
        (lambda rows: rows[1:], "rows with samples missing or twice: 1 (a.parquet row 0)"),
        (lambda rows: [*rows, rows[0] | {"source_row": 7}], "rows that are not of its shard: 1 (a.parquet row 7)"),
        (lambda rows: [*rows, rows[2] | {"sample": 1}], "failed rows that have other samples too: 1 (a.parquet row 1)"),
    ],
)
def test_rows_that_are_missing_twice_or_of_others(out: Path, change: Any, problem: str) -> None:
    shard = PLAN.shards[0]
    rows = change(rows_of(shard))
    write(out, shard, rows)
    assert one_problem(out) == f"{PLAN.part_name(shard)}: {problem}"
    assert verify(str(out)).pending == 3, "nothing of a part that is wrong counts"


@pytest.mark.parametrize(
    ("components", "column", "closes"),
    [
        ({}, None, True),  # an older moray's plan: not known
        ({"sampling.n": 2}, None, True),
        ({"sampling.n": 3}, None, False),
        ({"sampling.n": 1}, None, False),
        ({"sampling.n": 1, "sampling.columns": {"seed": "x"}}, ("x", [5, 5, 5]), False),
        ({"sampling.n": 1, "sampling.columns": {"n": "many"}}, None, True),  # not kept
        ({"sampling.n": 1, "sampling.columns": {"n": "sample"}}, None, True),  # not kept: the name is the part's own
        ({"sampling.n": 2, "sampling.columns": {"n": "many"}}, ("many", [2.0, None, None]), True),
        ({"sampling.n": 2, "sampling.columns": {"n": "many"}}, ("many", [2, 9, 3]), False),
        ({"task": "score", "input.continuation": "ends"}, None, True),  # not kept
        ({"task": "score", "input.continuation": "ends"}, ("ends", [["a", "b"], None, ["a", "b"]]), True),
        ({"task": "score", "input.continuation": "ends"}, ("ends", [["a", "b"], None, ["a", "b", "c"]]), False),
        ({"task": "score", "input.continuation": "ends"}, ("ends", ["a", "b", "c"]), False),
        ({"task": "score", "input.continuation": "ends", "input.token_ids": "i"}, ("ends", [[1, 2]] * 3), False),
        ({"task": "score", "input.continuation": "ends", "input.token_ids": "i"}, ("ends", [[[1], [2]]] * 3), True),
    ],
)
def test_a_last_sample_that_is_missing(
    tmp_path: Path, components: dict[str, Any], column: tuple[str, list[Any]] | None, closes: bool
) -> None:
    """A part alone cannot show this: a row has samples 0 and 1, but should there be a third one?"""
    shard = PLAN.shards[0]
    plan = Plan(Fingerprint({}, {"task": "generate"} | components), (shard,))
    OutputFolder(str(tmp_path)).write(PLAN_FILE, plan.to_json().encode())
    table = pa.Table.from_pylist(rows_of(shard), schema=SCHEMA)
    if column is not None:
        name, values = column
        table = table.append_column(name, pa.array([values[row] for row in table["source_row"].to_pylist()]))
    content = encode_part(table, plan.fingerprint.hexdigest, 0, COUNTS, TALLY, {})
    OutputFolder(str(tmp_path)).write(plan.part_name(shard), content)
    found = verify(str(tmp_path))
    problems = [problem.split(": ", 1)[1] for problem in found.problems]
    assert found.closes == closes and (closes or problems[0].startswith("rows with samples missing or twice: "))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"index": 2}, "shard 2, it is 0"),
        ({"counts": replace(COUNTS, ok=1)}, "its record says ok 1, it is 2"),
        ({"counts": replace(COUNTS, errors={"null_input": 1})}, "its record says errors"),
        ({"counts": replace(COUNTS, generated_tokens=9)}, "its record says generated_tokens 9, it is 8"),
        ({"tally": replace(TALLY, finish_reasons=Counter(stop=7))}, "says finish_reasons {'stop': 7}, it is {}"),
        ({"tally": replace(TALLY, histograms={**LENGTHS, "prompt_tokens": {}})}, "lengths of prompt_tokens {}, it is"),
        ({"schema": SCHEMA.remove(0)}, "schema"),
    ],
)
def test_records_and_schemas_that_do_not_agree(out: Path, changes: Any, problem: str) -> None:
    shard = PLAN.shards[2 if "schema" in changes else 0]
    write(out, shard, **changes)
    assert problem in one_problem(out)


def test_a_file_of_others(out: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), out / "more.parquet")
    assert one_problem(out) == "more.parquet: not a part of this job"


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not the output folder of a job"):
        verify(str(tmp_path))
    OutputFolder(str(tmp_path)).write(PLAN_FILE, b"{}")
    with pytest.raises(OutputError, match="cannot be read"):
        verify(str(tmp_path))
