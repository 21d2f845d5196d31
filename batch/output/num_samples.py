"""How many samples each row must have, as far as the job's plan and the kept columns determine it."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from moray.batch.output_columns import COLUMNS


def planned_samples(components: Mapping[str, Any], part: pa.Table) -> list[float | None]:
    """Return, for each line of a part, how many samples its row must have if it has not failed; None = not known.

    components:  components of the plan's fingerprint, without the files; those of older versions of moray may lack some
    """
    task = components.get("task")
    num_samples = components.get("sampling.n")
    column = (components.get("sampling.columns") or {}).get("n")
    if task == "classify":
        return [1] * part.num_rows
    if task == "score":
        column = components.get("input.continuation")
    elif column is None:
        return [num_samples] * part.num_rows
    if column not in part.column_names or column in COLUMNS.get(str(task), ()):  # the input column was not kept
        return [None] * part.num_rows
    if task == "score":
        return _num_continuations(part[column], components.get("input.token_ids") is not None)
    return [num_samples if value is None else value for value in part[column].to_pylist()]


def _num_continuations(column: "pa.ChunkedArray[Any]", are_ids: bool) -> list[float | None]:
    """Return the number of continuations in each value of the column.

    are_ids:  True where a list of token ids is one continuation
    """
    kind: Any = column.type
    if not _is_list(kind) or (are_ids and not _is_list(kind.value_type)):
        return [1] * len(column)
    lengths: list[float | None] = pc.list_value_length(column).to_pylist()
    return lengths


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_fixed_size_list(kind))
