"""The kinds of JSON values, and the types that columns of such values have in Arrow.

A column whose values have no common Arrow type holds each value as JSON text. Its field has the metadata JSON_KINDS,
with the kinds that occur.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic_core import from_json, to_json

JSON_KINDS = b"moray.json"  # key in the metadata of a field: its values are JSON text, of these kinds
_EXACT = 2**53  # whole numbers up to here are exact as doubles
_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "bool",
    float: "number",
    str: "text",
    list: "list",
    dict: "map",
}
_WHOLE = ("whole", "large")  # whole numbers that are exact as doubles, and those that only int64 holds; else "huge"

Kinds = frozenset[str]  # null, bool, whole, large, huge, number, text, list, map


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value."""
    if type(value) is not int:
        return _KINDS[type(value)]
    if -_EXACT <= value <= _EXACT:
        return "whole"
    return "large" if -(2**63) <= value < 2**63 else "huge"


def field_of(name: str, kinds: Collection[str]) -> "pa.Field[Any]":
    """Return the field of a column with values of these kinds: one Arrow type that holds all of them, or JSON text."""
    found = set(kinds) - {"null"}
    if not found:
        return pa.field(name, pa.null())
    for allowed, kind in (
        ({"text"}, pa.string()),
        ({"bool"}, pa.bool_()),
        (set(_WHOLE), pa.int64()),
        ({"whole", "number"}, pa.float64()),
    ):
        if found <= allowed:
            return pa.field(name, kind)
    return json_field(name, found)


def json_field(name: str, kinds: Collection[str]) -> "pa.Field[Any]":
    """Return the field of a column of JSON text."""
    return pa.field(name, pa.string(), metadata={JSON_KINDS: ",".join(sorted(kinds)).encode()})


def json_kinds(field: "pa.Field[Any]") -> Kinds | None:
    """Return the kinds of values in a column of JSON text; None for any other column."""
    text = (field.metadata or {}).get(JSON_KINDS)
    return None if text is None else frozenset(text.decode().split(","))


def build_column(values: Sequence[Any], field: "pa.Field[Any] | None") -> tuple["pa.Array[Any]", "pa.Field[Any]"]:
    """Return a column of JSON values, and its field without a name.

    field:  the type that it must have; None = that of these values

    Raises pa.ArrowException where a value does not fit the type.
    """
    field = field or field_of("", {kind_of(value) for value in values})
    if json_kinds(field) is not None:
        return pa.array([None if value is None else encode_json(value) for value in values], pa.string()), field
    return pa.array(values, field.type), field


def encode_json(value: Any) -> str:
    """Return a value as JSON text."""
    return to_json(value).decode()


def decode_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError where it is none."""
    return from_json(text, allow_inf_nan=False)


def decode_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line. Raises ValueError where there is none."""
    value = decode_json(line)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object with the row's columns, is a {kind_of(value)}")
    return value


def merge_kinds(files: Sequence[Mapping[str, Kinds]]) -> dict[str, Kinds]:
    """Return the kinds of each column over all files."""
    found: dict[str, Kinds] = {}
    for kinds in files:
        for name, some in kinds.items():
            found[name] = found.get(name, frozenset()) | some
    return found
