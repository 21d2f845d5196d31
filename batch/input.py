"""The input of a job: its files, which of their columns the job reads and keeps, all checked before anything runs."""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from batch.columns import INPUT_TYPES, TEMPLATE_TYPE, normalise, sampling_type
from batch.footer import InputFile, read_footer
from batch.listing import Listing, list_files
from batch.location import locate
from batch.output_schema import OUR_COLUMNS, output_schema
from batch.spec import JobSpec
from batch.spec_problems import nearest
from batch.template import PromptTemplate
from engine.errors import InputError, Problem, SpecError

_THREADS = 32
_SHOWN = 20
_KEEP_LESS = "name the columns to keep in output.keep"


@dataclass(frozen=True)
class _Use:
    """A column that the spec names at `where`, and the type it must have."""

    column: str
    where: str
    allowed: str
    is_right: Callable[[pa.DataType], bool]


@dataclass(frozen=True)
class InputFiles:
    """The files of a job, and what it takes from them.

    root:           path in the filesystem that the files' paths are relative to
    read_columns:   columns that the job reads, kept ones first
    kept_columns:   those it carries through
    output_schema:  of every part; a kept column is cast to its type there
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[InputFile, ...]
    read_columns: tuple[str, ...]
    kept_columns: tuple[str, ...]
    output_schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def full_path(self, path: str) -> str:
        """Path in the filesystem of a file given relative to the root."""
        return posixpath.join(self.root, path)


def read_input(spec: JobSpec) -> InputFiles:
    """List the input's files, read their footers and check their columns.

    Raises InputError with every mistake in the files, SpecError where a kept column has a reserved name.
    """
    paths = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    listing = list_files(paths)
    _refuse_output_among(listing, spec.output.path)
    files = _read_footers(listing)
    uses = list(_uses(spec))
    _raise_any(problem for file in files for problem in _check_file(file, uses))
    kept = _kept_columns(spec, files[0].schema)
    fields = _unify(files, kept)
    read = tuple(dict.fromkeys([*kept, *(use.column for use in uses)]))
    return InputFiles(listing.filesystem, listing.root, files, read, kept, output_schema(spec, fields))


def _refuse_output_among(listing: Listing, output: str) -> None:
    """Parts beside the input files would be input of the next run."""
    filesystem, folder = locate(output)
    if filesystem != listing.filesystem:
        return
    for path, _ in listing.files:
        if _lies_in(listing.full_path(path), folder):
            raise SpecError([Problem("output.path", f"holds the input file {path}; write to a folder of its own")])
    for parent in listing.folders:
        if _lies_in(folder, parent):
            raise SpecError([Problem("output.path", f"lies in the input folder {parent}; write to a folder beside it")])


def _lies_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _read_footers(listing: Listing) -> tuple[InputFile, ...]:
    def read(item: tuple[str, int]) -> InputFile | str:
        path, size = item
        try:
            return read_footer(listing.filesystem, listing.full_path(path), path, size)
        except (ValueError, OSError) as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(_THREADS, len(listing.files))) as pool:
        results = list(pool.map(read, listing.files))
    _raise_any(result for result in results if isinstance(result, str))
    return tuple(result for result in results if isinstance(result, InputFile))


def _uses(spec: JobSpec) -> Iterator[_Use]:
    """What the job reads beside what it keeps, and what the user asks to keep by name."""
    if spec.template.prompt is not None:
        for column in PromptTemplate(spec.template.prompt).columns:
            yield _Use(column, "template.prompt", *TEMPLATE_TYPE)
    else:
        yield _Use(spec.input.column, f"input.{spec.input.kind}", *INPUT_TYPES[spec.input.kind])
    for field, column in spec.sampling.columns.items():
        yield _Use(column, f"sampling.columns.{field}", *sampling_type(field))
    for column in spec.output.keep if isinstance(spec.output.keep, tuple) else ():
        yield _Use(column, "output.keep", "of any type", lambda kind: True)


def _check_file(file: InputFile, uses: list[_Use]) -> Iterator[str]:
    names = file.schema.names
    twice = {name for name in names if names.count(name) > 1}
    for name in sorted(twice):
        yield f"{file.path}: has two columns named {name!r}"
    for use in uses:
        if use.column not in names:
            yield f"{file.path}: has no column {use.column!r} ({use.where}){nearest(use.column, names)}"
        elif use.column not in twice:
            kind = file.schema.field(use.column).type
            if not pa.types.is_null(kind) and not use.is_right(kind):
                yield f"{file.path}: column {use.column!r} ({use.where}) must be {use.allowed}, is {kind}"


def _kept_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    if spec.output.keep == "none":
        return ()
    columns = tuple(schema.names) if spec.output.keep == "all" else spec.output.keep
    if reserved := [name for name in columns if name in OUR_COLUMNS]:
        others = ", ".join(name for name in columns if name not in OUR_COLUMNS)
        message = f"the job writes a column {reserved[0]!r} of its own; keep others: [{others}]"
        raise SpecError([Problem("output.keep", message)])
    return columns


def _unify(files: tuple[InputFile, ...], kept: tuple[str, ...]) -> "list[pa.Field[Any]]":
    """The kept columns with one type each. A column without values in one file (null) takes the others' type."""
    first: dict[str, InputFile] = {}
    problems = []
    for file in files:
        names = set(file.schema.names)
        for name in kept:
            if name not in names:
                problems.append(f"{file.path}: has no column {name!r}, which {files[0].path} has; {_KEEP_LESS}")
                continue
            kind = file.schema.field(name).type
            if pa.types.is_null(kind):
                continue
            known = first.setdefault(name, file).schema.field(name).type
            if normalise(kind) != normalise(known):
                problems.append(
                    f"{file.path}: column {name!r} is {kind}, but {known} in {first[name].path}; {_KEEP_LESS}"
                )
    _raise_any(problems)
    return [
        pa.field(name, normalise(first[name].schema.field(name).type) if name in first else pa.null()) for name in kept
    ]


def _raise_any(problems: Iterable[str]) -> None:
    lines = list(problems)
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
    if lines:
        raise InputError("\n".join(lines))
