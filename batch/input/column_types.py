"""Check the types of input columns, and find the one type that a column has in all parts of a job."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import types

from moray.batch.json_values import JSON_KINDS, Kinds

DataType = Any  # pa.DataType; its stubs lack the attributes of lists, maps and dictionaries

EXTENSION_NAME = b"ARROW:extension:name"  # metadata of a field of an extension type
_EXTENSION_KEYS = (EXTENSION_NAME, b"ARROW:extension:metadata", JSON_KINDS)


def normalise(kind: DataType) -> DataType:
    """Return the type that a column has in the output: without dictionaries and views, and with 32-bit offsets, at
    every depth.

    Encodings differ between the files of one data set (each writer chooses); the values are the same. An extension
    type of a Python package (pandas' periods, Ray's tensors) becomes its storage type, since a process without that
    package must read the same values. Arrow's own extension types stay as they are.
    """
    if isinstance(kind, pa.JsonType):
        return pa.json_()
    if isinstance(kind, pa.ExtensionType):
        return kind.storage_type
    if types.is_dictionary(kind):
        return normalise(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if is_any_list(kind):
        return pa.list_(normalise(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(normalise(kind.value_type), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, normalise(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(normalise(kind.key_type), normalise(kind.item_type))
    return kind


def plain(kind: DataType) -> DataType:
    """Return the type of a column's values in Python: the storage type of an extension."""
    kind = normalise(kind)
    if isinstance(kind, pa.Bool8Type):
        return pa.bool_()
    return normalise(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def is_any_list(kind: DataType) -> bool:
    """Return whether values are lists of any length, in any of Arrow's layouts."""
    return bool(
        types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind)
    )


def extension_metadata(field: "pa.Field[Any]") -> dict[bytes, bytes] | None:
    """Return the metadata from which a reader that knows the extension type restores it, or knows that a column of text
    is JSON; None where the field has no extension type, or one of Arrow's own."""
    if isinstance(field.type, pa.ExtensionType):
        return {
            EXTENSION_NAME: field.type.extension_name.encode(),
            _EXTENSION_KEYS[1]: field.type.__arrow_ext_serialize__(),
        }
    known = field.metadata or {}
    return {key: known[key] for key in _EXTENSION_KEYS if key in known} or None


def is_text(kind: DataType) -> bool:
    return bool(types.is_string(plain(kind)))


def is_number(kind: DataType) -> bool:
    kind = plain(kind)
    return bool(types.is_integer(kind) or types.is_floating(kind))


def is_boolean(kind: DataType) -> bool:
    return bool(types.is_boolean(plain(kind)))


def is_whole(kind: DataType) -> bool:
    return bool(types.is_integer(plain(kind)))


def is_scalar(kind: DataType) -> bool:
    """Return whether a column has one value a row that can be written as text."""
    flat = plain(kind)
    return (
        is_text(flat)
        or is_number(flat)
        or isinstance(kind, pa.UuidType)
        or bool(types.is_boolean(flat) or types.is_temporal(flat) or types.is_decimal(flat))
    )


def is_messages(kind: DataType) -> bool:
    """Return whether values may be conversations: JSON text, or lists of structs or maps with role and content or with
    from and value. A content is text, or a list of parts."""
    flat = plain(kind)
    if types.is_string(flat):
        return True
    if not types.is_list(flat):
        return False
    message = plain(flat.value_type)
    if types.is_map(message):
        return is_text(message.key_type)
    if not types.is_struct(message):
        return False
    fields = {field.name: field.type for field in message}
    pairs = (("role", "content"), ("from", "value"))
    return any(one in fields and is_text(fields[one]) and _is_content(fields.get(other)) for one, other in pairs)


def _is_content(kind: DataType | None) -> bool:
    """Return whether values may be the content of a message: text, or a list of parts; null where none has any."""
    if kind is None:
        return False
    flat = plain(kind)
    if types.is_null(flat) or types.is_string(flat):
        return True
    part = plain(flat.value_type) if is_any_list(flat) else None
    return part is not None and bool(types.is_struct(part) or types.is_map(part))


def is_list_of(is_item: Callable[[DataType], bool]) -> Callable[[DataType], bool]:
    """Make a check for lists whose items pass `is_item`."""

    def check(kind: DataType) -> bool:
        flat = plain(kind)
        return bool(types.is_list(flat) or types.is_fixed_size_list(flat)) and is_item(flat.value_type)

    return check


def is_bias(kind: DataType) -> bool:
    return bool(types.is_map(kind)) and is_whole(kind.key_type) and is_number(kind.item_type)


def is_json(kind: DataType) -> bool:
    """Return whether JSON can express the values: text, numbers, booleans, and lists and structs of them."""
    flat = plain(kind)
    if types.is_struct(flat):
        return all(is_json(field.type) for field in flat)
    if is_any_list(flat) or types.is_fixed_size_list(flat):
        return is_json(flat.value_type)
    return is_text(flat) or is_number(flat) or is_boolean(flat) or bool(types.is_null(flat))


Check = tuple[str, Callable[[DataType], bool]]  # the allowed type in words, and its check
INPUT_TYPES: dict[str, Check] = {
    "prompt": ("text", is_text),
    "messages": ("a list of structs or maps with the texts role and content, or such a list as JSON text", is_messages),
    "token_ids": ("a list of whole numbers", is_list_of(is_whole)),
}
_TEXTS: Check = ("text or a list of texts", lambda kind: is_text(kind) or is_list_of(is_text)(kind))
CONTINUATION_TYPES: dict[str, Check] = {
    "prompt": _TEXTS,
    "messages": _TEXTS,
    "token_ids": (
        "a list of whole numbers or a list of such lists",
        lambda kind: is_list_of(is_whole)(kind) or is_list_of(is_list_of(is_whole))(kind),
    ),
}
TEMPLATE_TYPE: Check = ("text or a number", is_scalar)
VARIABLE_TYPE: Check = ("text, a number, true or false, or lists and structs of them", is_json)
_NUMBER: Check = ("a number", is_number)
SAMPLING_TYPES: dict[str, Check] = {
    "ignore_eos": ("true or false", is_boolean),
    "stop": ("a list of texts", is_list_of(is_text)),
    "stop_token_ids": ("a list of whole numbers", is_list_of(is_whole)),
    "structured.json_schema": ("text", is_text),
    "structured.regex": ("text", is_text),
    "structured.grammar": ("text", is_text),
    "structured.choice": ("a list of texts", is_list_of(is_text)),
    "logit_bias": ("a map from whole numbers to numbers", is_bias),
}


_NUMBERS = frozenset({"whole", "large", "huge", "number"})
# The spec's keys -> the kinds of JSON values that may be in their columns, in files of lines. A column without any of
# them is refused; a row with another one is an error row.
JSON_VALUES: dict[str, Kinds] = {
    "input.prompt": frozenset({"text"}),
    "input.messages": frozenset({"list", "text"}),
    "input.token_ids": frozenset({"list"}),
    "input.continuation": frozenset({"text", "list"}),
    "template.prompt": _NUMBERS | {"text", "bool"},
    "sampling.columns.ignore_eos": frozenset({"bool"}),
    "sampling.columns.stop": frozenset({"list"}),
    "sampling.columns.stop_token_ids": frozenset({"list"}),
    "sampling.columns.logit_bias": frozenset({"map"}),
}


def sampling_type(field: str) -> Check:
    """Return the check of a column with values of a sampling field."""
    return SAMPLING_TYPES.get(field, _NUMBER)
