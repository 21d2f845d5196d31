"""How many samples each row must have, as far as the job's plan and the kept columns determine it."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from moray.batch.json_values import decode_json, json_kinds
from moray.batch.output_columns import COLUMNS


def planned_samples(components: Mapping[str, Any], part: pa.Table) -> list[float | None]:
    """Return, for each line of a part, how many samples its row must have if it has not failed; None = not known.

    components:  components of the plan's fingerprint, without the files; those of older versions of moray may lack some
    """
    task = components.get("task")
    num_samples = components.get("sampling.n")
    column: Any = (components.get("sampling.columns") or {}).get("n")
    if task == "score":
        column = components.get("input.continuation")
    elif column is None:
        return [num_samples] * part.num_rows
    if column not in part.column_names or column in COLUMNS.get(str(task), ()):  # the input column was not kept
        return [None] * part.num_rows
    if task == "score":
        are_ids = components.get("input.token_ids") is not None
        if json_kinds(part.schema.field(column)) is None:
            return _num_continuations(part[column], are_ids)
        return [_count_entries(value, are_ids) for value in _values(part, column)]
    return [num_samples if value is None else value for value in _values(part, column)]


def _num_continuations(column: "pa.ChunkedArray[Any]", are_ids: bool) -> list[float | None]:
    """Return the number of continuations in each value of the column.

    are_ids:  True where a list of token ids is one continuation
    """
    kind: Any = column.type
    if not _is_list(kind) or (are_ids and not _is_list(kind.value_type)):
        return [1] * len(column)
    lengths: list[float | None] = pc.list_value_length(column).to_pylist()
    return lengths


def _values(part: pa.Table, column: str) -> list[Any]:
    """Return the values of a column; those of a column of JSON text are decoded."""
    values: list[Any] = part[column].to_pylist()
    if json_kinds(part.schema.field(column)) is None:
        return values
    return [None if text is None else decode_json(text) for text in values]


def _count_entries(value: Any, are_ids: bool) -> float | None:
    """Return the number of continuations in a value of JSON, as _num_continuations."""
    if value is None:
        return None
    is_list = isinstance(value, list) and (not are_ids or any(isinstance(entry, list) for entry in value))
    return len(value) if is_list else 1


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_fixed_size_list(kind))
