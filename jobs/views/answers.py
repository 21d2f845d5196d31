"""Show some of a job's rows on the terminal: prompts with answers, right or wrong where that is known, and errors.

The answer of a row that was scored is its most likely continuation.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moray.batch.export.json_rows import read_rows
from moray.batch.output.folder import OutputFolder
from moray.batch.spec import JobSpec
from moray.batch.units import count

SHOWN_ANSWERS = 8
SHOWN_ERRORS = 5
MAX_CELL = 60  # characters of a prompt or an answer that are shown


@dataclass(frozen=True)
class Answers:
    """Holds the rows to show of a job's output, and counts.

    ok:          rows without an error, spread over the output, or over the values of a `task` column
    failed:      the first rows with an error
    num_failed:  all rows with an error
    num_known:   rows without an error whose input has the right answer in a column `expected`
    num_right:   rows of num_known with the right answer
    """

    ok: Sequence[dict[str, Any]]
    failed: Sequence[dict[str, Any]]
    num_failed: int
    num_known: int
    num_right: int


def read_answers(spec: JobSpec) -> Answers:
    """Read the rows to show from the parts in the output folder of a job."""
    folder = OutputFolder(spec.output.path)
    parts = [name for name in folder.names() if name.startswith("part-") and name.endswith(".parquet")]
    tables = [pq.read_table(f"{folder.root}/{name}", filesystem=folder.filesystem) for name in parts]
    if not tables:
        return Answers((), (), 0, 0, 0)
    rows = pa.concat_tables(tables)
    is_failed = pc.is_valid(rows["error"])
    ok, failed = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
    if spec.task == "score":
        ok = _best_continuations(spec, ok)
    if spec.task == "classify":
        kept = [name for name in ok.column_names if name != "generated_text"]
        ok = ok.select(kept).append_column("generated_text", ok["choice"])
    columns = [name for name in ("generated_text", "expected") if name in ok.column_names]
    marks = [is_right(row) for row in _to_rows(ok.select(columns))]
    return Answers(
        ok=list(_spread(ok)),
        failed=_to_rows(failed.slice(0, SHOWN_ERRORS)),
        num_failed=failed.num_rows,
        num_known=len(marks) - marks.count(None),
        num_right=marks.count(True),
    )


def _best_continuations(spec: JobSpec, scores: pa.Table) -> pa.Table:
    """Return one row an input row: the most likely continuation, the first among equals, as its generated_text."""
    scores = scores.sort_by(
        [("source_file", "ascending"), ("source_row", "ascending"), ("logprob", "descending"), ("sample", "ascending")]
    )
    firsts: dict[tuple[Any, Any], int] = {}
    rows = zip(scores["source_file"].to_pylist(), scores["source_row"].to_pylist(), strict=True)
    for index, key in enumerate(rows):
        firsts.setdefault(key, index)
    best = scores.take(pa.array(firsts.values(), pa.int64()))
    texts = [_continuation(spec, row) for row in _to_rows(best)]
    kept = [name for name in best.column_names if name != "generated_text"]
    return best.select(kept).append_column("generated_text", pa.array(texts, pa.string()))


def _continuation(spec: JobSpec, row: Mapping[str, Any]) -> str:
    """Return the text of a row's continuation, or its number where the job did not keep the column."""
    value = row.get(str(spec.input.continuation))
    if isinstance(value, list) and isinstance(value[0], str | list):
        value = value[row["sample"]]
    return f"continuation {row['sample']}" if value is None else str(value)


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Return whether the answer is the expected one; None where no answer is expected."""
    expected = row.get("expected")
    return None if expected is None else bool(row["generated_text"].strip() == expected.strip())


def _spread(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield about SHOWN_ANSWERS rows at equal distances, or the same number of each value of a `task` column."""
    if "task" not in rows.column_names:
        step = max(1, rows.num_rows // SHOWN_ANSWERS)
        for i in range(0, min(rows.num_rows, step * SHOWN_ANSWERS), step):
            yield from _to_rows(rows.slice(i, 1))
        return
    tasks = pc.unique(rows["task"])
    for task in tasks.slice(0, SHOWN_ANSWERS):
        yield from _to_rows(rows.filter(pc.equal(rows["task"], task)).slice(0, max(1, SHOWN_ANSWERS // len(tasks))))


def _to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows with their values; those of columns of JSON text are decoded."""
    return [row for batch in table.to_batches() for row in read_rows(batch)]


def render(spec: JobSpec, answers: Answers) -> RenderableType:
    """Render tables of answers and errors, and the path of all of them."""
    parts: list[RenderableType] = []
    if answers.ok:
        parts += [Text(), _answers_table(spec, answers)]
    if answers.num_known:
        known = count(answers.num_known, "answer")
        parts += [Text(), Text(f"{answers.num_right:,} of {known} are right.", style="bold")]
    if answers.failed:
        parts += [Text(), _errors_table(answers)]
    folder = spec.output.path if "://" in spec.output.path else os.path.abspath(spec.output.path)
    parts += [Text(), Text.assemble("All answers: ", (f"{folder}/part-*.parquet", "bold"), no_wrap=True)]
    return Group(*parts)


def _answers_table(spec: JobSpec, answers: Answers) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("Prompt", "Answer", ""):
        table.add_column(header)
    for row in answers.ok:
        marks = {None: "", True: "[green]right", False: "[red]wrong, should be"}
        mark = Text.from_markup(marks[is_right(row)])
        if is_right(row) is False:
            mark.append(f" {row['expected'].strip()}")
        table.add_row(_shorten(_prompt(spec, row)), _shorten(row["generated_text"]), mark)
    return table


def _errors_table(answers: Answers) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{count(answers.num_failed, 'row')} with an error")
    table.add_column("Code")
    table.add_column("Message", overflow="fold")
    for row in answers.failed:
        source = Text(f"{row['source_file']} row {row['source_row']:,}")
        table.add_row(source, Text(row["error"]["code"]), Text(row["error"]["message"]))
    return table


def _prompt(spec: JobSpec, row: dict[str, Any]) -> str:
    """Return the input as text, or the row's number where the job did not keep the column."""
    value = row.get(spec.input.column)
    if spec.input.kind == "messages" and isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value[-1].get("value"))
    return f"row {row['source_row']:,} of {row['source_file']}" if value is None else str(value)


def _shorten(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= MAX_CELL else line[: MAX_CELL - 3] + "...")
