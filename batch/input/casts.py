"""Convert the values of a column to another type or to valid UTF-8, where Arrow's own casts fail."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from moray.batch.input.column_types import DataType, is_any_list, normalise

Column = Any  # pa.ChunkedArray
_Array = Any  # pa.Array


def cast(column: Column, kind: DataType) -> Column:
    """Cast a column to the type that normalise() or the output schema gives it. The values stay the same.

    Raises pa.ArrowException where Arrow cannot cast it.
    """
    if column.type == kind:
        return column
    if types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    if isinstance(
        column.type, pa.BaseExtensionType
    ):  # Arrow casts no extension to another one, but each to its storage
        column = _map_chunks(column, lambda array: array.storage, column.type.storage_type)
        if isinstance(kind, pa.BaseExtensionType):
            stored = cast(column, kind.storage_type)
            return _map_chunks(stored, lambda array: pa.ExtensionArray.from_storage(kind, array), kind)
    if _has_views(column.type):  # Arrow's cast of list views gives wrong offsets where one is null
        column = pa.chunked_array(
            [
                _rebuild(chunk, lambda leaf: leaf.cast(normalise(leaf.type)))
                for chunk in column.chunks or [pa.nulls(0, column.type)]
            ]
        )
    return column.cast(kind)


def readable(column: Column) -> Column:
    """Return the column with U+FFFD for bytes that are not UTF-8, at every depth.

    Parquet allows such bytes, but most readers of the output would fail on them.
    """
    if not _has_text(column.type):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.chunked_array([_rebuild(chunk, _replace_invalid) for chunk in column.chunks], column.type)
    return column


def _replace_invalid(array: _Array) -> _Array:
    if not types.is_string(array.type):
        return array
    raw = array.cast(pa.binary()).to_pylist()
    return pa.array([None if data is None else data.decode(errors="replace") for data in raw], pa.string())


def _rebuild(array: _Array, change: Callable[[_Array], _Array]) -> _Array:
    """Apply `change` to each leaf array of a nested array. List views become lists."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _rebuild(array.storage, change).cast(kind.storage_type))
    if is_any_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        is_large = types.is_large_list(kind) or types.is_large_list_view(kind)
        offsets = pa.array([0, *lengths.cumsum()], pa.int64() if is_large else pa.int32())
        build = pa.LargeListArray if is_large else pa.ListArray
        return build.from_arrays(offsets, _list_values(array, change), mask=array.is_null())
    if types.is_struct(kind):
        children = [_rebuild(array.field(index), change) for index in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, [field.name for field in kind], mask=array.is_null())
    if types.is_map(kind) or types.is_fixed_size_list(kind):
        whole = array.take(pa.array(range(len(array)), pa.int64()))  # a copy whose children are as long as itself
        if types.is_map(kind):
            keys, items = _rebuild(whole.keys, change), _rebuild(whole.items, change)
            return pa.MapArray.from_arrays(whole.offsets, keys, items, mask=array.is_null())
        values = _rebuild(whole.values, change)
        return pa.FixedSizeListArray.from_arrays(values, kind.list_size, mask=array.is_null())
    return change(array)


def _list_values(array: _Array, change: Callable[[_Array], _Array]) -> _Array:
    """Rebuild the concatenated values of the lists, without the values of null lists."""
    if not (types.is_list_view(array.type) or types.is_large_list_view(array.type)):
        return _rebuild(array.flatten(), change)
    lists = zip(array.offsets.to_pylist(), array.sizes.to_pylist(), array.is_valid().to_pylist(), strict=True)
    indices = [at for first, size, is_valid in lists if is_valid for at in range(first, first + size)]
    return _rebuild(array.values, change).take(pa.array(indices, pa.int64()))  # flatten() fails on extension types


def _has_views(kind: DataType) -> bool:
    return bool(types.is_list_view(kind) or types.is_large_list_view(kind)) or any(map(_has_views, _children(kind)))


def _has_text(kind: DataType) -> bool:
    return bool(types.is_string(kind)) or any(map(_has_text, _children(kind)))


def _children(kind: DataType) -> list[DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    return [kind.field(index).type for index in range(kind.num_fields)] if types.is_nested(kind) else []


def _map_chunks(column: Column, change: Callable[[_Array], _Array], kind: DataType) -> Column:
    return pa.chunked_array([change(chunk) for chunk in column.chunks], kind)
