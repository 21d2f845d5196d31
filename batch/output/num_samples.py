"""How many samples a row must have, as far as a job's plan and the columns it keeps tell."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from batch.output.schema import COLUMNS


def planned_samples(components: Mapping[str, Any], part: pa.Table) -> list[float | None]:
    """Of each line of a part, where its row has not failed; None = nothing tells.

    components: what the plan's fingerprint is made of, without the files. Those of an older moray may lack some.
    """
    task = components.get("task")
    num_samples = components.get("sampling.n")
    column = (components.get("sampling.columns") or {}).get("n")
    if task == "score":
        column = components.get("input.continuation")
    elif column is None:
        return [num_samples] * part.num_rows
    if column not in part.column_names or column in COLUMNS.get(str(task), ()):  # it was not kept
        return [None] * part.num_rows
    if task == "score":
        return _num_continuations(part[column], components.get("input.token_ids") is not None)
    return [num_samples if value is None else value for value in part[column].to_pylist()]


def _num_continuations(column: "pa.ChunkedArray[Any]", are_ids: bool) -> list[float | None]:
    """are_ids: a list of token ids is one continuation"""
    kind: Any = column.type
    if not _is_list(kind) or (are_ids and not _is_list(kind.value_type)):
        return [1] * len(column)
    lengths: list[float | None] = pc.list_value_length(column).to_pylist()
    return lengths


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_fixed_size_list(kind))
