"""The input of a job: its files, which of their columns the job reads and keeps, all checked before anything runs."""

import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from batch.input.columns import check_columns, raise_all, unify_kept
from batch.input.footer import InputFile, read_footer
from batch.input.listing import Listing, list_files, would_find
from batch.location import locate
from batch.output.schema import output_schema
from batch.spec import JobSpec
from engine.errors import Problem, SpecError

_THREADS = 32
A_PART = "part-00000000-000000.parquet"  # as Plan.part_name has them


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
    needed = check_columns(spec, files)
    kept = unify_kept(spec, files)
    return InputFiles(
        filesystem=listing.filesystem,
        root=listing.root,
        files=files,
        read_columns=tuple(dict.fromkeys([*(field.name for field in kept), *needed])),
        kept_columns=tuple(field.name for field in kept),
        output_schema=output_schema(spec, kept),
    )


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
    for glob in listing.globs:
        if would_find(glob, posixpath.join(folder, A_PART)):
            message = f"its parts would be input too, of {glob}; write to a folder that it does not match"
            raise SpecError([Problem("output.path", message)])


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
    raise_all(result for result in results if isinstance(result, str))
    return tuple(result for result in results if isinstance(result, InputFile))
