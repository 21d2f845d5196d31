"""Read the columns that are in the names of folders, `lang=en/day=2024-01-01`, as Hive and Spark write them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from urllib.parse import unquote

import pyarrow as pa

from moray.batch.input.input_file import InputFile
from moray.batch.spec.input_section import HiveChoice
from moray.engine.errors import InputError

HIVE = b"moray.hive"  # key in the metadata of a field: its values come from the names of folders
_NULL = "__HIVE_DEFAULT_PARTITION__"
_OFF = "set input.hive: false to read no columns from the names of folders"


def read_keys(path: str) -> dict[str, str | None]:
    """Return the columns in the folders of a file's path, and their values as text.

    Raises ValueError where one occurs twice.
    """
    found: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if name and equals:
            key = unquote(name)
            if key in found:
                raise ValueError(f"its folders name {key!r} twice")
            found[key] = None if value == _NULL else unquote(value)
    return found


def find_keys(paths: Iterable[str], choice: HiveChoice) -> tuple[str, ...]:
    """Return the columns in the names of folders, which must be the same for all files.

    Raises InputError where they are not, or where there are none though the spec says so.
    """
    if choice is False:
        return ()
    first: tuple[str, tuple[str, ...]] | None = None
    for path in paths:
        try:
            keys = tuple(read_keys(path))
        except ValueError as error:
            raise InputError(f"{path}: {error}; {_OFF}") from None
        first = first or (path, keys)
        if set(keys) != set(first[1]):
            both = f"{path} has {_name(keys)}, {first[0]} has {_name(first[1])}"
            raise InputError(f"folders name columns for some files alone: {both}. Name paths that are alike, or {_OFF}")
    if choice is True and not (first and first[1]):
        raise InputError("input.hive is true, but no folder below input.path is named key=value; set it to auto")
    return first[1] if first else ()


def add_keys(files: Sequence[InputFile], keys: Sequence[str]) -> tuple[InputFile, ...]:
    """Return the files with the columns from the names of their folders.

    Raises InputError where a file has a column of that name itself.
    """
    if not keys:
        return tuple(files)
    for file in files:
        if both := [key for key in keys if key in file.schema.names]:
            raise InputError(f"{file.path}: column {both[0]!r} is in the file and in the name of a folder; {_OFF}")
    fields = [hive_field(key) for key in keys]
    return tuple(replace(file, schema=pa.schema([*file.schema, *fields])) for file in files)


def hive_field(key: str) -> "pa.Field[str]":
    """Return the field of a column from the names of folders."""
    return pa.field(key, pa.string(), metadata={HIVE: b""})


def is_hive(field: "pa.Field[object]") -> bool:
    """Return whether the values of a column come from the names of folders."""
    return HIVE in (field.metadata or {})


def _name(keys: Sequence[str]) -> str:
    return ", ".join(keys) or "none"
