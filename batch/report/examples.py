"""Find a few failed rows of each error code to show."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import Record
from moray.batch.shards import Plan

EXAMPLES = 3  # rows of a code
MAX_PARTS = 50  # parts that are read for examples; a job may have thousands
PROMPT_BATCH_ROWS = 16  # rows whose prompts are in memory at once: a prompt may have megabytes


@dataclass(frozen=True)
class Example:
    """Describes a failed row.

    file, row:  its input file and row number there
    prompt:     the prompt as text; None where the job did not keep it, or it was null
    """

    file: str
    row: int
    stage: str
    message: str
    prompt: str | None


def find_examples(
    folder: OutputFolder, plan: Plan, records: Mapping[int, Record], column: str | None
) -> dict[str, list[Example]]:
    """Return failed rows by error code, from the first parts that have some.

    column: the input's column of prompts
    """
    found: dict[str, list[Example]] = {}
    opened = 0
    for index in sorted(records):
        codes = [code for code in records[index].counts.errors if len(found.get(code, ())) < EXAMPLES]
        if not codes:
            continue
        try:
            for code, example in _read(folder, plan.part_name(plan.shards[index]), column, found):
                found.setdefault(code, []).append(example)
        except (pa.ArrowException, OSError):  # damaged behind its footer, which `moray verify` reports
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
    """Return the prompts of these rows, without the whole column in memory."""
    prompts: dict[int, str | None] = {}
    first = 0
    for batch in part.iter_batches(batch_size=PROMPT_BATCH_ROWS, columns=[column]):
        values = batch.column(0)
        prompts |= {i: _text(values[i - first]) for i in wanted if first <= i < first + len(values)}
        first += len(values)
        if not wanted or first > wanted[-1]:
            break
    return prompts


def _text(cell: Any) -> str | None:
    """Return a cell as text: a list (messages, token ids) as JSON, invalid UTF-8 with replacement characters, and for a
    value that Python cannot represent, such as a date after the year 9999 in a message, its type."""
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        value = cell.as_buffer().to_pybytes().decode(errors="replace")
    except Exception:  # Arrow, datetime and zoneinfo each raise their own kind
        return f"{cell.type}, which Python cannot read"
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
