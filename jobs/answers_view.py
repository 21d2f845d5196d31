"""Some of a job's rows for a person to look at: prompts with answers, right or wrong where that is known, errors. The
answer of a row that was scored is its likeliest continuation."""

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

from batch.output.folder import OutputFolder
from batch.quantities import count
from batch.spec import JobSpec

SHOWN_ANSWERS = 8
SHOWN_ERRORS = 5
WIDTH = 60  # characters of a prompt or an answer


@dataclass(frozen=True)
class Answers:
    """
    ok:          rows to show, spread over the output, or over the values of a `task` column
    failed:      the first rows with an error
    num_known:   rows without an error whose input says in `expected` what the answer is
    num_right:   those whose answer is that
    """

    ok: Sequence[dict[str, Any]]
    failed: Sequence[dict[str, Any]]
    num_failed: int
    num_known: int
    num_right: int


def read_answers(spec: JobSpec) -> Answers:
    """Look into the parts in the output folder of a job."""
    folder = OutputFolder(spec.output.path)
    parts = [name for name in folder.names() if name.startswith("part-") and name.endswith(".parquet")]
    tables = [pq.read_table(f"{folder.root}/{name}", filesystem=folder.filesystem) for name in parts]
    if not tables:
        return Answers((), (), 0, 0, 0)
    rows = pa.concat_tables(tables)
    is_failed = pc.is_valid(rows["error"])
    ok, failed = rows.filter(pc.invert(is_failed)), rows.filter(is_failed)
    if spec.task == "score":
        ok = _choose(spec, ok)
    columns = [name for name in ("generated_text", "expected") if name in ok.column_names]
    marks = [is_right(row) for row in ok.select(columns).to_pylist()]
    return Answers(
        ok=list(_spread(ok)),
        failed=failed.slice(0, SHOWN_ERRORS).to_pylist(),
        num_failed=failed.num_rows,
        num_known=len(marks) - marks.count(None),
        num_right=marks.count(True),
    )


def _choose(spec: JobSpec, scores: pa.Table) -> pa.Table:
    """The likeliest continuation of each input row, the first among equals, as its generated_text."""
    scores = scores.sort_by(
        [("source_file", "ascending"), ("source_row", "ascending"), ("logprob", "descending"), ("sample", "ascending")]
    )
    firsts: dict[tuple[Any, Any], int] = {}
    rows = zip(scores["source_file"].to_pylist(), scores["source_row"].to_pylist(), strict=True)
    for index, key in enumerate(rows):
        firsts.setdefault(key, index)
    best = scores.take(pa.array(firsts.values(), pa.int64()))
    texts = [_continuation(spec, row) for row in best.to_pylist()]
    others = [name for name in best.column_names if name != "generated_text"]
    return best.select(others).append_column("generated_text", pa.array(texts, pa.string()))


def _continuation(spec: JobSpec, row: Mapping[str, Any]) -> str:
    """As far as the job kept it."""
    value = row.get(str(spec.input.continuation))
    if isinstance(value, list) and isinstance(value[0], str | list):
        value = value[row["sample"]]
    return f"continuation {row['sample']}" if value is None else str(value)


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether the answer is the expected one; None where there is none."""
    expected = row.get("expected")
    return None if expected is None else bool(row["generated_text"].strip() == expected.strip())


def _spread(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """SHOWN_ANSWERS rows: as many of each task where there is such a column."""
    if "task" not in rows.column_names:
        step = max(1, rows.num_rows // SHOWN_ANSWERS)
        for i in range(0, min(rows.num_rows, step * SHOWN_ANSWERS), step):
            yield from rows.slice(i, 1).to_pylist()
        return
    tasks = pc.unique(rows["task"])
    for task in tasks.slice(0, SHOWN_ANSWERS):
        yield from rows.filter(pc.equal(rows["task"], task)).slice(0, max(1, SHOWN_ANSWERS // len(tasks))).to_pylist()


def draw(spec: JobSpec, answers: Answers) -> RenderableType:
    """Answers, errors, and where all of them lie."""
    parts: list[RenderableType] = []
    if answers.ok:
        parts += [Text(), _answers_table(spec, answers)]
    if answers.num_known:
        known = count(answers.num_known, "answer")
        parts += [Text(), Text(f"{answers.num_right:,} of {known} are right.", style="bold")]
    if answers.failed:
        parts += [Text(), _errors_table(answers)]
    where = spec.output.path if "://" in spec.output.path else os.path.abspath(spec.output.path)
    parts += [Text(), Text.assemble("All answers: ", (f"{where}/part-*.parquet", "bold"), no_wrap=True)]
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
        table.add_row(_cut(_prompt(spec, row)), _cut(row["generated_text"]), mark)
    return table


def _errors_table(answers: Answers) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{count(answers.num_failed, 'row')} with an error")
    table.add_column("Code")
    table.add_column("Message", overflow="fold")
    for row in answers.failed:
        place = Text(f"{row['source_file']} row {row['source_row']:,}")
        table.add_row(place, Text(row["error"]["code"]), Text(row["error"]["message"]))
    return table


def _prompt(spec: JobSpec, row: dict[str, Any]) -> str:
    """The input as text, as far as the job kept it."""
    value = row.get(spec.input.column)
    if spec.input.kind == "messages" and value:
        value = value[-1]["content"]
    return f"row {row['source_row']:,} of {row['source_file']}" if value is None else str(value)


def _cut(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
