"""Turn the rows of a part into JSON values, column by column."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types
from pydantic_core import to_json

from moray.batch.json_values import decode_json, json_kinds
from moray.engine.errors import OutputError

Row = dict[str, Any]


def read_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """Yield the rows of a batch with the values that encode_line writes.

    Columns that hold JSON text become the values again; maps with text as keys become objects.

    Raises OutputError where a value has no form in JSON.
    """
    columns = [_values(batch.column(index), batch.schema.field(index)) for index in range(batch.num_columns)]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def encode_line(row: Row) -> bytes:
    """Return a row as a line of JSON: bytes as base64, decimals as text, times in ISO 8601, and null for numbers that
    JSON does not have."""
    return to_json(row, inf_nan_mode="null", bytes_mode="base64", timedelta_mode="iso8601") + b"\n"


def _values(column: Any, field: "pa.Field[Any]") -> list[Any]:
    if types.is_timestamp(field.type) and field.type.unit == "ns":  # Python's have no nanoseconds
        zone = "" if field.type.tz is None else "%z"
        column = pc.strftime(column, format=f"%Y-%m-%dT%H:%M:%S{zone}")
    convert = _converter(column.type, is_json=json_kinds(field) is not None)
    try:
        values = column.to_pylist()
    except Exception:  # Arrow, datetime and zoneinfo each raise their own
        values = [_read_cell(cell, field.name) for cell in column]
    return values if convert is None else [None if value is None else convert(value) for value in values]


def _read_cell(cell: Any, name: str) -> Any:
    try:
        return cell.as_py()
    except Exception:
        try:
            return cell.cast(pa.string()).as_py()  # a date beyond the year 9999
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise OutputError(f"column {name!r}: {cell.type} {cell} cannot be written as JSON: {reason}") from None


def _converter(kind: Any, *, is_json: bool = False) -> Callable[[Any], Any] | None:
    """Return what turns a value as Arrow returns it into one for JSON; None where it is one."""
    if is_json or isinstance(kind, pa.JsonType):
        return _decode
    if types.is_map(kind) and types.is_string(kind.key_type):
        inner = _converter(kind.item_type) or _same
        return lambda pairs: {key: None if item is None else inner(item) for key, item in pairs}
    if types.is_list(kind) and (item := _converter(kind.value_type)) is not None:
        return lambda values: [None if value is None else item(value) for value in values]
    if types.is_struct(kind):
        fields = {field.name: change for field in kind if (change := _converter(field.type)) is not None}
        if fields:
            return lambda value: {
                name: fields[name](item) if name in fields and item is not None else item
                for name, item in value.items()
            }
    return None


def _decode(text: str) -> Any:
    """Return the value of a JSON text; text of another program that is none stays text."""
    try:
        return decode_json(text)
    except ValueError:
        return text


def _same(value: Any) -> Any:
    return value
