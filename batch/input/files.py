"""Read and check the input of a job before anything runs: its files, and the columns that the job reads and keeps."""

import logging
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from moray.batch.input.columns import check_columns, find_cut, find_gaps, raise_all, unify_kept, used_columns
from moray.batch.input.footer import MAGIC, has_small_values, read_footer
from moray.batch.input.formats import WANTED, Format
from moray.batch.input.hive import add_keys, find_keys
from moray.batch.input.input_file import InputFile
from moray.batch.input.layout import Layout
from moray.batch.input.line_file import read_line_file
from moray.batch.input.listing import Listing, list_files, name_some, would_find
from moray.batch.input.selection import Selection
from moray.batch.json_values import merge_kinds
from moray.batch.location import locate
from moray.batch.output_columns import output_schema
from moray.batch.shards import Slice
from moray.batch.spec import JobSpec
from moray.batch.spec.input_section import FormatChoice
from moray.batch.units import count, size
from moray.engine.errors import InputError, Problem, SpecError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 32  # files that are opened at once
_LINE_THREADS = 4  # files of lines that are read at once; parsing has one core
_MUCH_BYTES = 10**9  # of lines that are worth a word before they are read
_MAX_SNIFFED = 64  # files of other names whose first bytes are read
EXAMPLE_PART = "part-00000000-000000.parquet"  # a name as Plan.part_name makes them


@dataclass(frozen=True)
class InputFiles:
    """Describes the files of a job and the columns that it uses.

    root:           path in the filesystem that the files' paths are relative to
    layout:         how the files hold their rows
    read_columns:   columns that the job reads, kept ones first
    kept_columns:   input columns that are written to the output
    output_schema:  schema of every part; a kept column is cast to its type there
    warnings:       lines about what the job leaves out or may read with less precision
    selected:       file -> the numbers of the rows that the job has; None = all rows of all files
    """

    filesystem: fs.FileSystem
    root: str
    layout: Layout
    files: tuple[InputFile, ...]
    read_columns: tuple[str, ...]
    kept_columns: tuple[str, ...]
    output_schema: pa.Schema
    warnings: tuple[str, ...] = ()
    selected: Mapping[str, Sequence[int]] | None = None

    @property
    def format(self) -> Format:
        return self.layout.format

    @property
    def hive_keys(self) -> tuple[str, ...]:
        """Return the columns from the names of folders that the job reads."""
        return tuple(key for key in self.layout.hive_keys if key in self.read_columns)

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for _, rows in self.rows)

    @property
    def rows(self) -> "Iterator[tuple[str, Sequence[int]]]":
        """Yield the files in order, and the numbers of the rows of each that the job has."""
        for file in self.files:
            yield file.path, range(file.num_rows) if self.selected is None else self.selected[file.path]

    def full_path(self, path: str) -> str:
        """Return the path in the filesystem of a file given relative to the root."""
        return posixpath.join(self.root, path)

    def place(self, slices: Iterable[Slice]) -> tuple[Slice, ...]:
        """Return the slices with what a reader needs to find their rows quickly."""
        return tuple(self._files[piece.file].place(piece) for piece in slices)

    @cached_property
    def _files(self) -> dict[str, InputFile]:
        return {file.path: file for file in self.files}


def read_input(spec: JobSpec) -> InputFiles:
    """List the input's files, read their footers and check their columns.

    Raises InputError with every mistake in the files, SpecError where a kept column has a reserved name.
    """
    paths = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    listing = list_files(paths, spec.input.format)
    _check_output_apart(listing, spec.output.path)
    keys = find_keys((path for path, _ in listing.files), spec.input.hive)
    read = _read_footers(listing) if listing.format == "parquet" else _read_lines(listing, used_columns(spec))
    files = add_keys(read, keys)
    needed = check_columns(spec, files, listing.format)
    kept = unify_kept(spec, files, lambda file, name, limit: _is_small(listing, file, name, limit))
    layout = Layout(listing.format, keys)
    selected = None
    if spec.input.selects:
        selected = Selection(spec.input, listing.filesystem, listing.root, layout).select(files)
    read_columns = tuple(dict.fromkeys([*(field.name for field in kept), *needed]))
    return InputFiles(
        filesystem=listing.filesystem,
        root=listing.root,
        layout=layout,
        selected=selected,
        files=files,
        read_columns=read_columns,
        kept_columns=tuple(field.name for field in kept),
        output_schema=output_schema(spec, kept),
        warnings=(
            *_find_left_out(listing, spec.input.format),
            *find_gaps(spec, files),
            *find_cut(read_columns, files),
            *_describe_selection(spec, files, selected),
        ),
    )


def _describe_selection(
    spec: JobSpec, files: Sequence[InputFile], selected: Mapping[str, Sequence[int]] | None
) -> Iterator[str]:
    """Yield how many rows the job has, where it does not have all."""
    if selected is not None:
        keys = [f"input.{name}" for name in ("where", "sample", "limit") if getattr(spec.input, name) is not None]
        rows, total = sum(map(len, selected.values())), sum(file.num_rows for file in files)
        yield f"the job has {rows:,} of the {count(total, 'row')} of its files, by {' and '.join(keys)}"


def _find_left_out(listing: Listing, choice: FormatChoice) -> Iterator[str]:
    """Yield warnings about files that are not read, since their names or a pattern leave them out."""
    if listing.missed:
        missed = f"{count(len(listing.missed), 'file')} beside those that the pattern finds"
        yield f"{missed}, which it leaves out: {name_some(listing.missed)}"
    if not listing.left_out:
        return
    names = listing.left_out
    yield f"{count(len(names), 'file')} left out, not named {WANTED[choice]}: {name_some(names)}"
    if listing.format == "jsonl":
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        sniffed = list(pool.map(lambda path: _begins_as_parquet(listing, path), names[:_MAX_SNIFFED]))
    if parquet := [path for path, is_parquet in zip(names, sniffed, strict=False) if is_parquet]:
        yield f"Parquet all the same is {name_some(parquet)}; rename it or name it in input.path to have it read"


def _begins_as_parquet(listing: Listing, path: str) -> bool:
    try:
        with listing.filesystem.open_input_file(listing.full_path(path)) as file:
            return bytes(file.read(len(MAGIC))) == MAGIC
    except OSError:
        return False


def _check_output_apart(listing: Listing, output: str) -> None:
    """Raise SpecError where the output folder is part of the input: its parts would be input of the next run."""
    filesystem, folder = locate(output)
    if filesystem != listing.filesystem:
        return
    for path, _ in listing.files:
        if _is_inside(listing.full_path(path), folder):
            raise SpecError([Problem("output.path", f"holds the input file {path}; write to a folder of its own")])
    for parent in listing.folders:
        if _is_inside(folder, parent):
            raise SpecError(
                [Problem("output.path", f"is inside the input folder {parent}; write to a folder outside it")]
            )
    for glob in listing.globs:
        if would_find(glob, posixpath.join(folder, EXAMPLE_PART)):
            message = f"its parts would be input too, of {glob}; write to a folder that it does not match"
            raise SpecError([Problem("output.path", message)])


def _is_inside(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _is_small(listing: Listing, file: InputFile, column: str, limit: int) -> bool:
    try:
        full_path = listing.full_path(file.path)
        return listing.format == "parquet" and has_small_values(listing.filesystem, full_path, file.size, column, limit)
    except (ValueError, OSError) as error:
        raise InputError(f"{file.path}: {error}") from None


def _read_footers(listing: Listing) -> tuple[InputFile, ...]:
    return _read_each(
        listing, _THREADS, lambda full_path, path, size: read_footer(listing.filesystem, full_path, path, size)
    )


def _read_lines(listing: Listing, columns: Collection[str] | None) -> tuple[InputFile, ...]:
    """Read files of JSON lines as a whole. Columns get the types that hold their values of all files."""
    num_bytes = sum(size for _, size in listing.files)
    if num_bytes > _MUCH_BYTES:
        logger.warning("reading %s of JSON lines, to find rows and types; this takes a while", size(num_bytes))
    files = _read_each(
        listing,
        _LINE_THREADS,
        lambda full_path, path, size: read_line_file(listing.filesystem, full_path, path, size, columns),
    )
    kinds = merge_kinds([file.kinds for file in files])
    return tuple(file.describe(kinds) for file in files)


def _read_each(listing: Listing, threads: int, read: Callable[[str, str, int], T]) -> tuple[T, ...]:
    """Read each file, several at once. Raises InputError with every file that cannot be read.

    read:  gets the full path, the path and the size; raises ValueError or OSError
    """

    def try_read(item: tuple[str, int]) -> T | str:
        path, num_bytes = item
        try:
            return read(listing.full_path(path), path, num_bytes)
        except (ValueError, OSError) as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(threads, len(listing.files))) as pool:
        results = list(pool.map(try_read, listing.files))
    raise_all(result for result in results if isinstance(result, str))
    return tuple(result for result in results if not isinstance(result, str))
