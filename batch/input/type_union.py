"""Find the one type that holds the values of a column of two files, where none is lost."""

from typing import Any

import pyarrow as pa
from pyarrow import types

from moray.batch.input.column_types import DataType, is_any_list, normalise

_INTEGERS = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
_UNITS = ("s", "ms", "us", "ns")
_MAX_DIGITS = 38  # of a decimal128


def unite(one: DataType, other: DataType, *, exact: bool = True) -> DataType | None:
    """Return the type that holds all values of both; None where there is none.

    Order and number of the fields of structs, and the width of numbers, may differ. Types are compared in their plain
    form.

    exact:  False also gives types that hold the values only if they are small enough: double for int64 and double, and
            the finer unit of timestamps, of whole columns. See needs_small
    """
    one, other = normalise(one), normalise(other)
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if isinstance(one, pa.BaseExtensionType) or isinstance(other, pa.BaseExtensionType):
        return None
    if _are(types.is_struct, one, other):
        return _unite_structs(one, other)
    if _are(_is_list, one, other):
        value = unite(one.value_type, other.value_type)
        return None if value is None else pa.list_(value)
    if _are(types.is_map, one, other):
        key = unite(one.key_type, other.key_type)
        item = unite(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _are(types.is_timestamp, one, other) and one.tz == other.tz:
        return None if exact else pa.timestamp(_finer(one.unit, other.unit), one.tz)
    if _are(types.is_duration, one, other):
        return None if exact else pa.duration(_finer(one.unit, other.unit))
    if _are(types.is_decimal, one, other):
        return _unite_decimals(one, other)
    return _unite_numbers(one, other, exact)


def needs_small(kind: DataType, united: DataType) -> int | None:
    """Return the largest absolute value that a column may hold to be cast without a loss; None where all may be cast.

    kind:    the type of the column, whose stored values are whole numbers if there is a limit
    united:  what unite returned for it
    """
    if types.is_integer(kind) and types.is_floating(united):
        return None if kind.bit_width < 64 else 2**53
    if _are(types.is_timestamp, kind, united) or _are(types.is_duration, kind, united):
        factor = 1000 ** (_UNITS.index(united.unit) - _UNITS.index(kind.unit))
        return None if factor == 1 else (2**63 - 1) // factor
    return None


def _unite_structs(one: DataType, other: DataType) -> DataType | None:
    fields: dict[str, Any] = {}
    for field in (*one, *other):
        kind = field.type if field.name not in fields else unite(fields[field.name], field.type)
        if kind is None:
            return None
        fields[field.name] = kind
    if len(fields) < max(one.num_fields, other.num_fields):  # two fields of one name
        return None
    return pa.struct(list(fields.items()))


def _unite_numbers(one: DataType, other: DataType, exact: bool) -> DataType | None:
    if _are(types.is_integer, one, other):
        if one.bit_width != other.bit_width and types.is_signed_integer(one) == types.is_signed_integer(other):
            return max(one, other, key=lambda kind: kind.bit_width)
        # a signed type of twice the width holds an unsigned one
        return _INTEGERS.get(max(kind.bit_width * (1 + types.is_unsigned_integer(kind)) for kind in (one, other)))
    if _are(types.is_floating, one, other):
        return max(one, other, key=lambda kind: kind.bit_width)
    whole, real = (one, other) if types.is_integer(one) else (other, one)
    if not (types.is_integer(whole) and types.is_floating(real)):
        return None
    if whole.bit_width < 32 and real.bit_width == 32:
        return pa.float32()
    return pa.float64() if whole.bit_width < 64 or not exact else None


def _unite_decimals(one: DataType, other: DataType) -> DataType | None:
    scale = max(one.scale, other.scale)
    digits = max(one.precision - one.scale, other.precision - other.scale) + scale
    return pa.decimal128(digits, scale) if digits <= _MAX_DIGITS else None


def _finer(one: str, other: str) -> Any:
    return max(one, other, key=_UNITS.index)


def _is_list(kind: DataType) -> bool:
    return is_any_list(kind) or bool(types.is_fixed_size_list(kind))


def _are(check: Any, one: DataType, other: DataType) -> bool:
    return bool(check(one)) and bool(check(other))
