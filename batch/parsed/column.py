"""Read generated JSON into a column of the type that its schema gives.

A value is exact or the whole row is null: what a type does not hold is never rounded, cut or left out. The text of
such a row is beside it.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from moray.batch.parsed.json_type import JsonType

_SCALARS = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_INT64_DIGITS = 19


class _Number(str):
    """Holds a number of JSON as it is written."""

    __slots__ = ()


class _Object(tuple[tuple[str, Any], ...]):
    """Holds the keys and values of an object of JSON, in order, with keys that occur twice."""

    __slots__ = ()


def arrow_type(kind: JsonType) -> pa.DataType:
    """Return the type of a column."""
    if kind.kind == "object":
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in kind.fields.items()])
    if kind.items is not None:
        return pa.list_(arrow_type(kind.items))
    return _SCALARS[kind.kind]


def parse_column(texts: Sequence[str | None], finish_reasons: Sequence[str], kind: JsonType) -> "pa.Array[Any]":
    """Return a column with the values of JSON texts; null for one that is cut or not of this type, and for None.

    finish_reasons:  why each text ended: what max_tokens cut may look complete, as 12 of 123 does
    """
    values = [
        None if text is None or reason == "length" else _parse(text, kind)
        for text, reason in zip(texts, finish_reasons, strict=True)
    ]
    return pa.array(values, arrow_type(kind))


def _parse(text: str, kind: JsonType) -> Any:
    try:
        value = json.loads(
            text, parse_int=_Number, parse_float=_Number, parse_constant=_refuse, object_pairs_hook=_Object
        )
        return _convert(value, kind)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _convert(value: Any, kind: JsonType) -> Any:
    """Return a value as Arrow takes it. Raises ValueError where the type does not hold it exactly."""
    if value is None:
        return None
    if kind.kind == "json":
        return _encodable(_dump(value))
    if kind.kind == "text" and isinstance(value, str) and not isinstance(value, _Number):
        return _encodable(value)
    if kind.kind == "boolean" and isinstance(value, bool):
        return value
    if kind.kind == "integer" and isinstance(value, _Number):
        return _to_int64(value)
    if kind.kind == "number" and isinstance(value, _Number):
        return _to_double(value)
    if kind.items is not None and isinstance(value, list):
        return [_convert(item, kind.items) for item in value]
    if kind.kind == "object" and isinstance(value, _Object):
        if len({name for name, _ in value}) < len(value) or any(name not in kind.fields for name, _ in value):
            raise ValueError("has keys that the type does not hold")
        return {name: _convert(inner, kind.fields[name]) for name, inner in value}
    raise ValueError(f"is not {kind.kind}")


def _to_int64(text: str) -> int:
    number = Decimal(text)
    if number.adjusted() >= _INT64_DIGITS:  # before its digits are written out, of which 1e999999 has many
        raise ValueError("is beyond 64 bits")
    whole = int(number)
    if whole != number or not -(2**63) <= whole < 2**63:
        raise ValueError("is not a whole number of 64 bits")
    return whole


def _to_double(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("is beyond a double")
    return number


def _encodable(text: str) -> str:
    """Return the text. Raises UnicodeEncodeError, a ValueError, for half of a surrogate pair, which no column holds."""
    text.encode()
    return text


def _dump(value: Any) -> str:
    """Return compact JSON, with numbers as they were written and keys that occur twice."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, _Object):
        return "{" + ",".join(f"{_dump(name)}:{_dump(inner)}" for name, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
