"""A few failed rows of each error code, to look at."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch.output.folder import OutputFolder
from batch.output.part import Record
from batch.planning.plan import Plan

EXAMPLES = 3  # of a code
MAX_PARTS = 50  # that are opened for them
SOME_ROWS = 16  # of a column of long prompts that are in memory at once


@dataclass(frozen=True)
class Example:
    """prompt: what the job kept of it as text; None where it kept none, or it was null"""

    file: str
    row: int
    stage: str
    message: str
    prompt: str | None


def find_examples(
    folder: OutputFolder, plan: Plan, records: Mapping[int, Record], column: str | None
) -> dict[str, list[Example]]:
    """By code, of the first parts that have some. column: of the prompts"""
    found: dict[str, list[Example]] = {}
    opened = 0
    for index in sorted(records):
        codes = [code for code in records[index].counts.errors if len(found.get(code, ())) < EXAMPLES]
        if not codes:
            continue
        try:
            for code, example in _read(folder, plan.part_name(plan.shards[index]), column, found):
                found.setdefault(code, []).append(example)
        except (pa.ArrowException, OSError):  # damaged behind its footer: verify tells
            pass
        opened += 1
        if opened == MAX_PARTS:
            break
    return found


def _read(
    folder: OutputFolder, name: str, column: str | None, found: Mapping[str, list[Example]]
) -> Iterator[tuple[str, Example]]:
    with folder.open(name) as file, pq.ParquetFile(file) as part:
        rows = part.read(columns=["error", "source_file", "source_row"]).to_pylist()
        missing = {code: EXAMPLES - len(examples) for code, examples in found.items()}
        wanted: list[int] = []
        for index, row in enumerate(rows):
            code = None if row["error"] is None else row["error"]["code"]
            if code is not None and missing.setdefault(code, EXAMPLES) > 0:
                missing[code] -= 1
                wanted.append(index)
        has_prompts = column in part.schema_arrow.names
        prompts = _prompts(part, str(column), wanted) if has_prompts else dict.fromkeys(wanted)
        for index in wanted:
            row, error = rows[index], rows[index]["error"]
            example = Example(
                row["source_file"], row["source_row"], error["stage"], error["message"], prompts.get(index)
            )
            yield error["code"], example


def _prompts(part: pq.ParquetFile, column: str, wanted: list[int]) -> dict[int, str | None]:
    """Of these rows, without the whole column in memory: a prompt may have megabytes."""
    prompts: dict[int, str | None] = {}
    first = 0
    for batch in part.iter_batches(batch_size=SOME_ROWS, columns=[column]):
        values = batch.column(0)
        prompts |= {i: _text(values[i - first]) for i in wanted if first <= i < first + len(values)}
        first += len(values)
        if not wanted or first > wanted[-1]:
            break
    return prompts


def _text(cell: Any) -> str | None:
    """A list (messages, token ids) as JSON; text that is not UTF-8 as far as it is."""
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        value = cell.as_buffer().to_pybytes().decode(errors="replace")
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
