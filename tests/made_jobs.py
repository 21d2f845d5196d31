"""Jobs for tests: specs over the tiny model, their input and their output."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from repository import EXAMPLES

from moray.batch.spec import JobSpec

TINY = EXAMPLES / "tiny-phimoe"


def make_spec(folder: Path, **sections: Any) -> JobSpec:
    """A spec that reads folder/in and writes folder/out."""
    values: dict[str, Any] = {
        "name": "test",
        "model": {"path": str(TINY)},
        "input": {"path": str(folder / "in")},
        "output": {"path": str(folder / "out")},
    }
    if sections.get("task", "generate") == "generate":
        values["sampling"] = {"max_tokens": 8}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return JobSpec.model_validate(values)


def write_input(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> None:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def read_output(folder: Path) -> list[dict[str, Any]]:
    """The rows of a job's parts, in the order of the input."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "out").glob("*.parquet"))])
    rows: list[dict[str, Any]] = table.to_pylist()
    return sorted(rows, key=lambda row: (row["source_file"], row["source_row"], row["sample"]))


def damage(path: Path, row_group: int, column: int = 0) -> None:
    """Overwrite the data of a column in a row group; the footer stays as it is."""
    chunk = pq.read_metadata(path).row_group(row_group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
