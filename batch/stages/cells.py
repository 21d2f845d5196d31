"""What stands in the cells of an input column, as Python values, and what is wrong with them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batch.stages.rows import Failure

TokenIds = Sequence[int]


def read_values(table: pa.Table, name: str) -> list[Any]:
    """A column as Python values, with a Failure for text that is not UTF-8: Parquet does not rule it out."""
    column = table.column(name)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_read_value(cell, name) for cell in column]


def _read_value(cell: "pa.Scalar[Any]", name: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Failure("read", "bad_utf8", f"column {name!r} is not valid UTF-8: {error}")


def check_ids(row: Sequence[int | None], vocab_size: int) -> TokenIds | Failure:
    """The row, if the model has all its tokens."""
    for index, token_id in enumerate(row):
        if token_id is None or not 0 <= token_id < vocab_size:
            found = "null" if token_id is None else token_id
            message = f"token id {index} is {found}; this model's go from 0 to {vocab_size - 1}"
            return Failure("tokenize", "bad_token_id", message)
    return [token_id for token_id in row if token_id is not None]
