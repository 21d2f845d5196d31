"""Reads the values of an input column as Python values, with a Failure for each that cannot be read."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
from pyarrow import types

from moray.batch.json_values import decode_json, json_kinds
from moray.batch.stages.block_schemas import Failure
from moray.engine.errors import show

TokenIds = Sequence[int]
_SHOWN = 60  # characters of a value that a message shows


def read_values(table: pa.Table, name: str) -> list[Any]:
    """Return a column as Python values, with a Failure for each value that Python cannot represent.

    These are text that is not UTF-8, dates after the year 9999 and times beyond a day: Parquet allows them all. JSON
    text of a file of lines becomes the value that was in the line.
    """
    column = table.column(name)
    if json_kinds(table.schema.field(name)) is not None:
        return [None if text is None else decode_json(text) for text in column.to_pylist()]
    try:
        column.validate(full=True)
        return list(column.to_pylist())
    except Exception:  # Arrow, datetime, pandas and zoneinfo each raise their own
        return [_read_value(cell, name) for cell in column]


def _read_value(cell: "pa.Scalar[Any]", name: str) -> Any:
    try:
        return _convert(cell)
    except Exception as error:
        bad = _find_bad(cell)
        code = "bad_utf8" if _is_text(bad) else "bad_value"
        if code == "bad_utf8":
            return Failure("read", code, f"column {name!r} is not valid UTF-8: {_reason(error)}")
        place = "" if bad is cell else " in this row"
        return Failure("read", code, f"column {name!r}{place}: {_show(bad)} cannot be read: {_reason(error)}")


def _convert(cell: Any) -> Any:
    cell.validate(full=True)
    array = pa.array([cell], cell.type) if types.is_time(cell.type) else None
    if array is not None:  # the check of a scalar accepts times of day outside of the day
        array.validate(full=True)
    for child in _children(cell):
        _convert(child)
    return cell.as_py()


def _find_bad(cell: Any) -> Any:
    """Return the innermost value that cannot be converted."""
    for child in _children(cell):
        try:
            _convert(child)
        except Exception:
            return _find_bad(child)
    return cell


def _children(cell: Any) -> Iterator[Any]:
    if not cell.is_valid:
        return
    if isinstance(cell, pa.ExtensionScalar):
        yield cell.value
    elif isinstance(cell, pa.StructScalar):
        for index in range(cell.type.num_fields):
            yield cell[index]
    elif types.is_nested(cell.type):
        yield from cell.values


def _is_text(cell: Any) -> bool:
    return bool(types.is_string(cell.type) or types.is_large_string(cell.type) or types.is_string_view(cell.type))


def _show(cell: Any) -> str:
    """Format a value by its type and what is stored: `date32[day] 3000000`."""
    text = ""
    with suppress(Exception):
        text = f" {cell.value}"
    return f"{cell.type}{text[:_SHOWN]}"


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_ids(row: Sequence[int | None], vocab_size: int) -> TokenIds | Failure:
    """Return the row's token ids, or a Failure where the model does not have one of them."""
    for index, token_id in enumerate(row):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            found = show(token_id)
            message = f"token id {index} is {found}; this model's go from 0 to {vocab_size - 1}"
            return Failure("tokenize", "bad_token_id", message)
    return [token_id for token_id in row if token_id is not None]
