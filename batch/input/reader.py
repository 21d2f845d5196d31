"""ShardReader reads the rows of one shard after the other and keeps the file open between them."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from moray.batch.input.casts import cast
from moray.batch.input.column_types import normalise
from moray.batch.input.footer import INT96_UNIT, identify, read_footer_bytes
from moray.batch.retry import StoreError
from moray.batch.shards import Slice
from moray.engine.errors import InputError, JobError

_BATCH_ROWS = 1024  # rows that are decoded at once
_BUFFER_BYTES = 1 << 20  # buffer of each column's reads


@dataclass
class _OpenFile:
    """Holds a file that is read from row `next_row` on.

    version:  size and modification time when it was opened
    starts:   first row of each row group
    rest:     rows that were decoded and not returned yet
    """

    path: str
    version: tuple[int, int]
    parquet: pq.ParquetFile
    starts: list[int]
    batches: Iterator[pa.RecordBatch]
    next_row: int
    rest: pa.RecordBatch | None = None


class ShardReader:
    """Reads `columns` of the files below `root`, each cast to its type in `schema` or to the plain form of its own.

    A shard that continues where the last one ended costs only its own rows, however large its row group is. Any other
    shard also costs the rows before it in its row group.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, columns: Sequence[str], schema: pa.Schema) -> None:
        self._filesystem = filesystem
        self._root = root
        self._columns = list(columns)
        self._types = {name: schema.field(name).type for name in columns if name in schema.names}
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)
        self._identities: Mapping[str, str] = {}
        self._open: _OpenFile | None = None

    def expect(self, identities: Mapping[str, str]) -> None:
        """Set the identities of the files by path, as the job was planned: read() refuses a file with another one."""
        self._identities = identities

    def read(self, piece: Slice) -> pa.Table:
        """Read the rows of a slice, with `columns` in order.

        Raises InputError when the file has changed since the job was planned, StoreError when its object store does
        not return it, pa.ArrowException or OSError when its data cannot be read.
        """
        try:
            table = self._read(piece)
        except BaseException:
            self._open = None
            raise
        return pa.table([self._plain(name, table) for name in self._columns], names=self._columns)

    def _read(self, piece: Slice) -> pa.Table:
        file = self._open
        version = self._version(piece.file)
        is_open = file is not None and (file.path, file.version) == (piece.file, version)
        if file is None or not is_open or file.next_row > piece.first_row:
            parquet = self._open_file(piece.file, version[0])
            starts = list(accumulate(_row_groups(parquet), initial=0))[:-1]
            file = self._open = self._start(version, parquet, starts, piece)
        elif file.starts[_group_of(file.starts, piece.first_row)] > file.next_row:
            file = self._open = self._start(version, file.parquet, file.starts, piece)
        batches = []
        end = piece.first_row + piece.num_rows
        while file.next_row < end:
            batch = file.rest if file.rest is not None else next(file.batches, None)
            if batch is None:
                raise InputError(f"{piece.file}: ends at row {file.next_row:,}; it had {end:,} or more when planned")
            skip = min(batch.num_rows, max(0, piece.first_row - file.next_row))
            num_rows = min(batch.num_rows - skip, end - file.next_row - skip)
            if num_rows > 0:
                batches.append(batch.slice(skip, num_rows))
            file.next_row += skip + num_rows
            file.rest = batch.slice(skip + num_rows) if skip + num_rows < batch.num_rows else None
        return pa.Table.from_batches(batches)

    def split(self, piece: Slice) -> list[Slice]:
        """Cut the slice where row groups end, so that a row group that cannot be decoded fails no rows of others."""
        parquet = self._open_file(piece.file, self._version(piece.file)[0])
        pieces, start, end = [], 0, piece.first_row + piece.num_rows
        for rows in _row_groups(parquet):
            first, last = max(start, piece.first_row), min(start + rows, end)
            if first < last:
                pieces.append(Slice(piece.file, first, last - first))
            start += rows
        return pieces

    def check_reachable(self, piece: Slice) -> None:
        """Raise StoreError where an object store does not return the file's bytes: then its rows are not bad."""
        if self._is_local:
            return
        try:
            with self._filesystem.open_input_file(self._path(piece.file)) as source:
                source.read()
        except OSError as error:
            raise self._unreachable(piece.file, error) from None

    def _start(self, version: tuple[int, int], parquet: pq.ParquetFile, starts: list[int], piece: Slice) -> _OpenFile:
        """Start to read at the row group with the slice's first row."""
        group = _group_of(starts, piece.first_row)
        first_row = starts[group] if starts else 0
        return _OpenFile(piece.file, version, parquet, starts, _batches(parquet, group, self._columns), first_row)

    def _version(self, file: str) -> tuple[int, int]:
        try:
            info = self._filesystem.get_file_info(self._path(file))
        except OSError as error:
            raise self._unreachable(file, error) from None
        if info.type != fs.FileType.File:
            raise InputError(f"{file}: is not there any more. Put it back and run the job again.")
        return info.size, info.mtime_ns or 0

    def _open_file(self, file: str, size: int) -> pq.ParquetFile:
        try:
            footer = read_footer_bytes(self._filesystem, self._path(file), size)
            found, planned = identify(size, footer), self._identities.get(file)
            if planned not in (None, found):
                raise ValueError("it has been changed since the job was planned")
            source = self._filesystem.open_input_file(self._path(file))
            # Buffered, not pre-buffered: that needs the memory of some pages a column, not of a row group.
            return pq.ParquetFile(
                source,
                metadata=pq.read_metadata(pa.BufferReader(footer)),
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                coerce_int96_timestamp_unit=INT96_UNIT,
                page_checksum_verification=True,
            )
        except (ValueError, pa.ArrowException) as error:
            advice = "Put the file back that was planned, or give the new one an output folder of its own."
            raise InputError(f"{file}: is not the file that was planned: {error}. {advice}") from None
        except OSError as error:
            raise self._unreachable(file, error) from None

    def _unreachable(self, file: str, error: OSError) -> JobError:
        message = f"{file}: cannot be read: {str(error).splitlines()[0]}. Run the job again when it can."
        return JobError(message) if self._is_local else StoreError(message)

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def _plain(self, name: str, table: pa.Table) -> Any:
        """Return a column in its type; nulls where this file does not have it and other files do."""
        if name not in table.schema.names:
            return pa.chunked_array([pa.nulls(table.num_rows, self._types[name])])
        column = table.column(name)
        return cast(column, self._types.get(name, normalise(column.type)))


def _group_of(starts: list[int], row: int) -> int:
    """Return the number of the row group with this row."""
    return max(0, bisect_right(starts, row) - 1)


def _batches(parquet: pq.ParquetFile, first_group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(first_group, parquet.metadata.num_row_groups):
        yield from parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)


def _row_groups(parquet: pq.ParquetFile) -> Iterator[int]:
    """Yield the number of rows of each row group."""
    metadata = parquet.metadata
    for group in range(metadata.num_row_groups):
        yield metadata.row_group(group).num_rows
