"""Which rows are run again, and how their answers get into a part."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Counts
from moray.batch.output.failed_rows import find_failed, merge
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import encode_part
from moray.batch.output.part_stats import count_part
from moray.batch.output_columns import ERROR
from moray.batch.shards import Plan, Shard, Slice
from moray.engine.errors import OutputError

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_generated_tokens", pa.int32()),
        pa.field("sample", pa.int32()),
        pa.field("error", ERROR),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
    ]
)


def row(file: str, number: int, *texts: str, code: str | None = None) -> list[dict[str, Any]]:
    """Return a row of the input, with its samples."""
    source = {"source_file": file, "source_row": number, "num_prompt_tokens": 3, "num_generated_tokens": 2}
    if code is not None:
        return [source | {"sample": 0, "error": {"stage": "generate", "code": code, "message": "..."}}]
    return [source | {"sample": sample, "text": text} for sample, text in enumerate(texts)]


def table(*rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([one for samples in rows for one in samples], schema=SCHEMA)


PART = table(
    row("a", 7, code="row_timeout"),
    row("a", 8, "a8", "a8+"),
    row("b", 0, code="null_input"),
    row("b", 1, code="row_timeout"),
    row("b", 2, code="row_timeout"),
    row("b", 3, "b3", "b3+"),
    row("b", 4, code="row_timeout"),
)
SHARDS = (Shard(0, (Slice("a", 0, 7),)), Shard(1, (Slice("a", 7, 2), Slice("b", 0, 5))))
PLAN = Plan(Fingerprint({}, {}), SHARDS)


@pytest.mark.parametrize(
    ("codes", "slices"),
    [
        (["row_timeout"], [("a", 7, 1), ("b", 1, 2), ("b", 4, 1)]),
        (["null_input"], [("b", 0, 1)]),
        (["null_input", "nan_logits"], [("b", 0, 1)]),
        ([], [("a", 7, 1), ("b", 0, 3), ("b", 4, 1)]),
        (["nan_logits"], None),
    ],
)
def test_failed_rows_by_code(tmp_path: Path, codes: list[str], slices: list[tuple[str, int, int]] | None) -> None:
    folder, (counts, stats) = OutputFolder(str(tmp_path)), count_part(PART, 1.0, Counter())
    folder.write(PLAN.part_name(SHARDS[1]), encode_part(PART, PLAN.fingerprint.hexdigest, 1, counts, stats, {}))
    committed = {0: Counts(ok=7), 1: counts}  # of the part that has no failed rows nothing is read: it is not there
    want = {} if slices is None else {1: Shard(1, tuple(Slice(*piece) for piece in slices))}
    assert find_failed(folder, PLAN, committed, codes) == want


def test_a_part_that_is_gone_meanwhile_is_named(tmp_path: Path) -> None:
    name = PLAN.part_name(SHARDS[1])
    with pytest.raises(OutputError, match=f"{name} cannot be read"):
        find_failed(OutputFolder(str(tmp_path)), PLAN, {1: Counts(ok=3, failed=4)}, ())


def test_rows_take_the_place_of_what_they_replace() -> None:
    again = table(row("a", 7, "a7", "a7+"), row("b", 2, code="nan_logits"), row("b", 4, "b4", "b4+"))
    merged = merge(PART, again)
    assert merged.equals(
        table(
            row("a", 7, "a7", "a7+"),
            row("a", 8, "a8", "a8+"),
            row("b", 0, code="null_input"),
            row("b", 1, code="row_timeout"),
            row("b", 2, code="nan_logits"),
            row("b", 3, "b3", "b3+"),
            row("b", 4, "b4", "b4+"),
        )
    )
    errors = {"null_input": 1, "row_timeout": 1, "nan_logits": 1}
    counts, _ = count_part(merged, 2.5, Counter())
    assert counts == Counts(4, 3, prompt_tokens=12, generated_tokens=16, engine_s=2.5, errors=errors)
    assert merge(merged, again).equals(merged), "once more changes nothing"


def test_a_row_that_the_part_does_not_hold_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"does not hold: .*'b', 9"):
        merge(PART, table(row("b", 9, "b9")))
