"""Which types the columns of an input may have, and the one type that all parts of a job give them."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import types

DataType = Any  # pa.DataType, of which type checkers do not know what lists, maps and dictionaries add


def normalise(kind: DataType) -> DataType:
    """The type a column has in the output: without dictionaries, and with 32-bit offsets, at every depth.

    These differ between files of one data set (each writer chooses); the values are the same.
    """
    if types.is_dictionary(kind):
        return normalise(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_large_list(kind):
        return pa.list_(normalise(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(normalise(kind.value_type), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, normalise(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(normalise(kind.key_type), normalise(kind.item_type))
    return kind


def is_text(kind: DataType) -> bool:
    return bool(types.is_string(normalise(kind)))


def is_number(kind: DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind))


def is_scalar(kind: DataType) -> bool:
    """One value a row that reads well as text."""
    return (
        is_text(kind)
        or is_number(kind)
        or bool(types.is_boolean(kind) or types.is_temporal(kind) or types.is_decimal(kind))
    )


def is_messages(kind: DataType) -> bool:
    if not types.is_list(normalise(kind)) or not types.is_struct(normalise(kind).value_type):
        return False
    struct = normalise(kind).value_type
    fields = {field.name: field.type for field in struct}
    return all(name in fields and is_text(fields[name]) for name in ("role", "content"))


def is_list_of(is_item: Callable[[DataType], bool]) -> Callable[[DataType], bool]:
    def check(kind: DataType) -> bool:
        flat = normalise(kind)
        return bool(types.is_list(flat) or types.is_fixed_size_list(flat)) and is_item(flat.value_type)

    return check


def is_bias(kind: DataType) -> bool:
    return bool(types.is_map(kind)) and bool(types.is_integer(kind.key_type)) and is_number(kind.item_type)


Check = tuple[str, Callable[[DataType], bool]]
INPUT_TYPES: dict[str, Check] = {
    "prompt": ("text", is_text),
    "messages": ("a list of structs with the texts role and content", is_messages),
    "token_ids": ("a list of whole numbers", is_list_of(types.is_integer)),
}
_TEXTS: Check = ("text or a list of texts", lambda kind: is_text(kind) or is_list_of(is_text)(kind))
CONTINUATION_TYPES: dict[str, Check] = {
    "prompt": _TEXTS,
    "messages": _TEXTS,
    "token_ids": (
        "a list of whole numbers or a list of such lists",
        lambda kind: is_list_of(types.is_integer)(kind) or is_list_of(is_list_of(types.is_integer))(kind),
    ),
}
TEMPLATE_TYPE: Check = ("text or a number", is_scalar)
_NUMBER: Check = ("a number", is_number)
SAMPLING_TYPES: dict[str, Check] = {
    "ignore_eos": ("true or false", types.is_boolean),
    "stop": ("a list of texts", is_list_of(is_text)),
    "stop_token_ids": ("a list of whole numbers", is_list_of(types.is_integer)),
    "logit_bias": ("a map from whole numbers to numbers", is_bias),
}


def sampling_type(field: str) -> Check:
    return SAMPLING_TYPES.get(field, _NUMBER)


def readable(column: "pa.ChunkedArray[pa.Scalar[Any]]") -> "pa.ChunkedArray[pa.Scalar[Any]]":
    """The column, with U+FFFD for bytes that are not UTF-8: Parquet does not rule them out, but who reads the output
    would fail on them."""
    if column.type != pa.string():
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raw = column.cast(pa.binary()).to_pylist()
        return pa.chunked_array(
            [[None if data is None else data.decode(errors="replace") for data in raw]], pa.string()
        )
    return column
