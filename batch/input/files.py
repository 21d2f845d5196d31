"""Read and check the input of a job before anything runs: its files, and the columns that the job reads and keeps."""

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from moray.batch.input.columns import check_columns, find_cut, find_gaps, raise_all, unify_kept
from moray.batch.input.footer import MAGIC, InputFile, read_footer
from moray.batch.input.listing import WANTED, Listing, list_files, name_some, would_find
from moray.batch.location import locate
from moray.batch.output_columns import output_schema
from moray.batch.spec import JobSpec
from moray.batch.units import count
from moray.engine.errors import Problem, SpecError

_THREADS = 32  # files that are opened at once
_MAX_SNIFFED = 64  # files of other names whose first bytes are read
EXAMPLE_PART = "part-00000000-000000.parquet"  # a name as Plan.part_name makes them


@dataclass(frozen=True)
class InputFiles:
    """Describes the files of a job and the columns that it uses.

    root:           path in the filesystem that the files' paths are relative to
    read_columns:   columns that the job reads, kept ones first
    kept_columns:   input columns that are written to the output
    output_schema:  schema of every part; a kept column is cast to its type there
    warnings:       lines about what the job leaves out or may read with less precision
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[InputFile, ...]
    read_columns: tuple[str, ...]
    kept_columns: tuple[str, ...]
    output_schema: pa.Schema
    warnings: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def full_path(self, path: str) -> str:
        """Return the path in the filesystem of a file given relative to the root."""
        return posixpath.join(self.root, path)


def read_input(spec: JobSpec) -> InputFiles:
    """List the input's files, read their footers and check their columns.

    Raises InputError with every mistake in the files, SpecError where a kept column has a reserved name.
    """
    paths = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    listing = list_files(paths)
    _check_output_apart(listing, spec.output.path)
    files = _read_footers(listing)
    needed = check_columns(spec, files)
    kept = unify_kept(spec, files)
    read_columns = tuple(dict.fromkeys([*(field.name for field in kept), *needed]))
    return InputFiles(
        filesystem=listing.filesystem,
        root=listing.root,
        files=files,
        read_columns=read_columns,
        kept_columns=tuple(field.name for field in kept),
        output_schema=output_schema(spec, kept),
        warnings=(
            *_find_left_out(listing),
            *_find_keys(files),
            *find_gaps(spec, files),
            *find_cut(read_columns, files),
        ),
    )


def _find_left_out(listing: Listing) -> Iterator[str]:
    """Yield warnings about files that are not read, since neither name nor spec marks them as Parquet."""
    if not listing.left_out:
        return
    names = listing.left_out
    yield f"{count(len(names), 'file')} left out, not named {WANTED}: {name_some(names)}"
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


def _find_keys(files: Sequence[InputFile]) -> Iterator[str]:
    """Yield a warning about keys in the names of folders (`lang=en`), as Hive and Spark write them."""
    keys: dict[str, str] = {}
    for file in files:
        for part in file.path.split("/")[:-1]:
            key, equals, _ = part.partition("=")
            if equals and key and key not in keys and key not in file.schema.names:
                keys[key] = part
    if keys:
        shown, example = ", ".join(keys), next(iter(keys.values()))
        yield f"folders name {shown} ({example}): not read as a column; source_file has it in each row"


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


def _read_footers(listing: Listing) -> tuple[InputFile, ...]:
    def read(item: tuple[str, int]) -> InputFile | str:
        path, size = item
        try:
            return read_footer(listing.filesystem, listing.full_path(path), path, size)
        except (ValueError, OSError) as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(_THREADS, len(listing.files))) as pool:
        results = list(pool.map(read, listing.files))
    raise_all(result for result in results if isinstance(result, str))
    return tuple(result for result in results if isinstance(result, InputFile))
