"""Check the columns of an input: those that the job needs must have a usable type, those it keeps one type."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.input.casts import cast
from moray.batch.input.column_types import (
    CONTINUATION_TYPES,
    EXTENSION_NAME,
    INPUT_TYPES,
    JSON_VALUES,
    TEMPLATE_TYPE,
    VARIABLE_TYPE,
    extension_metadata,
    is_text,
    normalise,
    sampling_type,
)
from moray.batch.input.formats import Format
from moray.batch.input.hive import is_hive
from moray.batch.input.input_file import InputFile
from moray.batch.input.type_union import needs_small, unite
from moray.batch.json_values import json_kinds
from moray.batch.output_columns import reserved_names
from moray.batch.spec import JobSpec
from moray.batch.spec.template import PromptTemplate
from moray.batch.spec.where import find_columns, parse_where
from moray.engine.errors import InputError, Problem, SpecError
from moray.engine.settings.problems import nearest

_SHOWN = 20  # mistakes that are listed at most
_KEEP = "output.keep"
_REQUIRED = ("input.prompt", "input.messages", "input.token_ids", "input.continuation", "template.prompt")
_WORDS = ("a number", "true or false")  # types that the text in a folder's name may stand for
_KEEP_LESS = "name the columns to keep in output.keep"


@dataclass(frozen=True)
class _Use:
    """Describes a column that the spec names.

    key:       the spec's key that names it
    allowed:   the type it must have, in words
    is_valid:  checks the type
    """

    column: str
    key: str
    allowed: str
    is_valid: Callable[[pa.DataType], bool]


def check_columns(spec: JobSpec, files: Sequence[InputFile], format: Format = "parquet") -> tuple[str, ...]:
    """Return the columns that the spec names, each once.

    A file of lines may lack a column that rows need not have, where another file has it.

    Raises InputError where a file lacks one or has it with a wrong type.
    """
    uses = list(_uses(spec))
    optional = frozenset(name for file in files for name in file.schema.names) if format == "jsonl" else frozenset()
    # a file of lines without columns has bad lines alone
    checked = [file for file in files if format == "parquet" or not all(map(is_hive, file.schema))]
    raise_all(problem for file in checked for problem in _check_file(file, uses, optional))
    return tuple(dict.fromkeys(use.column for use in uses))


def used_columns(spec: JobSpec) -> frozenset[str] | None:
    """Return all columns that the job reads; None where it keeps whatever there is."""
    if spec.output.keep == "all":
        return None
    compared = () if spec.input.where is None else find_columns(parse_where(spec.input.where))
    return frozenset(use.column for use in _uses(spec)) | frozenset(compared)


def prompt_columns(spec: JobSpec) -> tuple[str, ...]:
    """Return the columns that prompts and their sampling need, without those that are only kept."""
    return tuple(dict.fromkeys(use.column for use in _uses(spec) if use.key != _KEEP))


IsSmall = Callable[[InputFile, str, int], bool]  # whether a column's values are at most a limit, without their signs


def unify_kept(
    spec: JobSpec, files: Sequence[InputFile], is_small: IsSmall = lambda file, name, limit: False
) -> "list[pa.Field[Any]]":
    """Return the kept columns with one type each, which holds the values of all files; see unite.

    A column that some files lack is null in their rows.

    is_small:  is asked where the type holds only small values

    Raises InputError where a column differs between files or cannot be written, SpecError where one has the name of an
    output column.
    """
    fields = []
    problems: list[str] = []
    for name, holders in _kept_holders(spec, files).items():
        first = next((file for file in holders if not pa.types.is_null(file.schema.field(name).type)), holders[0])
        source = first.schema.field(name)
        kind, extension = normalise(source.type), extension_metadata(source)
        known = f"{_describe(source)} in {first.path}"
        different = []
        for file in holders:
            other = file.schema.field(name)
            if other.equals(source, check_metadata=True) or pa.types.is_null(other.type):
                continue  # the common case, and quick
            different.append(file)
            united = None
            if extension_metadata(other) == extension:
                united = unite(kind, other.type) or unite(kind, other.type, exact=False)
            if united is None:
                problems.append(f"{file.path}: column {name!r} is {_describe(other)}, but {known}; {_KEEP_LESS}")
            else:
                kind = united
        for file in holders if different else ():
            limit = needs_small(normalise(file.schema.field(name).type), kind)
            if limit is not None and not is_small(file, name, limit):
                problems.append(
                    f"{file.path}: column {name!r} is {_describe(file.schema.field(name))}, whose values {kind}, the "
                    f"type that other files need, may not hold; {_KEEP_LESS}"
                )
        field = pa.field(name, kind, metadata=extension)
        try:
            cast(pa.chunked_array([], source.type), kind)
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{first.path}: column {name!r}, {source.type}, cannot be kept: {reason}; {_KEEP_LESS}")
        fields.append(field)
    raise_all(problems)
    return fields


def _describe(field: "pa.Field[Any]") -> str:
    """Format a column's type as `int64`, and an extension as `pandas.period {"freq": "M"} (int64)`."""
    extension = extension_metadata(field)
    if extension is None:
        return str(field.type)
    extension_text = " ".join(text.decode(errors="replace") for text in extension.values() if text)
    return f"{extension_text} ({normalise(field.type)})"


def find_gaps(spec: JobSpec, files: Sequence[InputFile]) -> Iterator[str]:
    """Yield a warning for each kept column that some of the files lack."""
    for name, holders in _kept_holders(spec, files).items():
        if len(holders) < len(files):
            having = f"{len(holders):,} of {len(files):,} files, the first {holders[0].path}"
            yield f"column {name!r} is in {having}; it is null in the rows of the other files"


def find_cut(names: Collection[str], files: Sequence[InputFile]) -> Iterator[str]:
    """Yield a warning for each column that is read and may lose nanoseconds."""
    for name in names:
        if holders := [file for file in files if name in file.cut_columns]:
            having = f"{len(holders):,} of {len(files):,} files, the first {holders[0].path}"
            yield (
                f"column {name!r} has timestamps as INT96 in {having}; they are read in microseconds, and nanoseconds "
                "are cut. Write it as INT64 timestamps to keep them"
            )


def raise_all(problems: Iterable[str]) -> None:
    """Raise InputError with all problems, a line each, if there are any."""
    lines = list(problems)
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
    if lines:
        raise InputError("\n".join(lines))


def _uses(spec: JobSpec) -> Iterator[_Use]:
    """Yield the columns that the job needs, and those that output.keep names."""
    if spec.template.prompt is not None:
        for column in PromptTemplate(spec.template.prompt).columns:
            yield _Use(column, "template.prompt", *TEMPLATE_TYPE)
    else:
        yield _Use(spec.input.column, f"input.{spec.input.kind}", *INPUT_TYPES[spec.input.kind])
    if spec.input.continuation is not None:
        yield _Use(spec.input.continuation, "input.continuation", *CONTINUATION_TYPES[spec.input.kind])
    for name, column in spec.template.columns.items():
        yield _Use(column, f"template.columns.{name}", *VARIABLE_TYPE)
    for field, column in spec.sampling.columns.items():
        yield _Use(column, f"sampling.columns.{field}", *sampling_type(field))
    for column in spec.output.keep if isinstance(spec.output.keep, tuple) else ():
        yield _Use(column, _KEEP, "of any type", lambda kind: True)


def _check_file(file: InputFile, uses: list[_Use], optional: frozenset[str]) -> Iterator[str]:
    """Yield what is wrong with the columns of a file.

    optional:  columns that it may lack, unless a row without them cannot run
    """
    names = file.schema.names
    twice = {name for name in names if names.count(name) > 1}
    for name in sorted(twice):
        yield f"{file.path}: has two columns named {name!r}"
    for use in uses:
        if use.column not in names:
            if use.column not in optional or use.key in _REQUIRED:
                yield f"{file.path}: has no column {use.column!r} ({use.key}){nearest(use.column, names)}"
        elif use.column not in twice and (kind := _find_wrong_type(file.schema.field(use.column), use)) is not None:
            yield f"{file.path}: column {use.column!r} ({use.key}) must be {use.allowed}, is {kind}"


def _find_wrong_type(field: "pa.Field[Any]", use: _Use) -> str | None:
    """Return the type of a column in words where the use does not allow it."""
    if is_hive(field) and use.key.startswith("sampling.columns.") and use.allowed in _WORDS:
        return None
    kinds = json_kinds(field)
    if kinds is not None:
        return None if kinds & JSON_VALUES.get(use.key, kinds) else f"JSON ({', '.join(sorted(kinds))})"
    if pa.types.is_null(field.type) or (use.is_valid(field.type) and _reads_as_stored(field, use)):
        return None
    name = (extension_metadata(field) or {}).get(EXTENSION_NAME, b"").decode()
    return f"{name} ({normalise(field.type)})" if name else str(field.type)


def _reads_as_stored(field: "pa.Field[Any]", use: _Use) -> bool:
    """Return whether the stored values are the values that a user sees. Those of pandas' periods are not: they are
    stored as whole numbers of months since 1970, which do not belong into a prompt."""
    return use.key != "template.prompt" or extension_metadata(field) is None or is_text(field.type)


def _kept_holders(spec: JobSpec, files: Sequence[InputFile]) -> dict[str, list[InputFile]]:
    """Return the files that have each kept column, by column in the order of their first appearance."""
    if spec.output.keep == "none":
        return {}
    requested = None if spec.output.keep == "all" else dict.fromkeys(spec.output.keep)
    holders: dict[str, list[InputFile]] = {name: [] for name in requested or ()}
    for file in files:
        for name in dict.fromkeys(file.schema.names) if requested is None else requested:
            holders.setdefault(name, []).append(file)
    own_columns = reserved_names(spec)
    if reserved := [name for name in holders if name in own_columns]:
        others = ", ".join(name for name in holders if name not in own_columns)
        message = f"the job writes a column {reserved[0]!r} of its own; keep others: [{others}]"
        raise SpecError([Problem(_KEEP, message)])
    return holders
