"""ShardReader: the rows of one shard after the other, with the file kept open between them."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from batch.input.column_types import normalise
from batch.plan import Slice
from engine.errors import InputError

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20


@dataclass
class _Open:
    """A file being read from row `next_row` on. rest: what was read of it and not asked for yet; starts: first row of
    each row group."""

    path: str
    parquet: pq.ParquetFile
    starts: list[int]
    batches: Iterator[pa.RecordBatch]
    next_row: int
    rest: pa.RecordBatch | None = None


class ShardReader:
    """Reads `columns` of the files below `root`, each cast to its type in `schema` or to the plain form of its own.

    A shard that continues where the last one ended costs what its rows cost, however large its row group is; one that
    comes later costs what lies before it in its row group too.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, columns: Sequence[str], schema: pa.Schema) -> None:
        self._filesystem = filesystem
        self._root = root
        self._columns = list(columns)
        self._types = {name: schema.field(name).type for name in columns if name in schema.names}
        self._open: _Open | None = None

    def read(self, piece: Slice) -> pa.Table:
        """The rows of a slice, `columns` in order.

        Raises InputError when the file is not what it was, pa.ArrowException or OSError when its data cannot be read.
        """
        try:
            table = self._read(piece)
        except BaseException:
            self._open = None
            raise
        return pa.table([self._plain(name, table.column(name)) for name in self._columns], names=self._columns)

    def _read(self, piece: Slice) -> pa.Table:
        file = self._open
        if file is None or file.path != piece.file or file.next_row > piece.first_row:
            parquet = self._open_file(piece.file)
            starts = list(accumulate(_row_groups(parquet), initial=0))[:-1]
            file = self._open = self._start(parquet, starts, piece)
        elif file.starts[_group_of(file.starts, piece.first_row)] > file.next_row:
            file = self._open = self._start(file.parquet, file.starts, piece)
        batches = []
        end = piece.first_row + piece.num_rows
        while file.next_row < end:
            batch = file.rest if file.rest is not None else next(file.batches, None)
            if batch is None:
                raise InputError(f"{piece.file}: ends at row {file.next_row:,}; it had {end:,} or more when planned")
            skip = min(batch.num_rows, max(0, piece.first_row - file.next_row))
            take = min(batch.num_rows - skip, end - file.next_row - skip)
            if take > 0:
                batches.append(batch.slice(skip, take))
            file.next_row += skip + take
            file.rest = batch.slice(skip + take) if skip + take < batch.num_rows else None
        return pa.Table.from_batches(batches)

    def split(self, piece: Slice) -> list[Slice]:
        """The slice, cut where row groups end: one that cannot be decoded takes no other with it."""
        parquet = self._open_file(piece.file)
        pieces, start, end = [], 0, piece.first_row + piece.num_rows
        for rows in _row_groups(parquet):
            first, last = max(start, piece.first_row), min(start + rows, end)
            if first < last:
                pieces.append(Slice(piece.file, first, last - first))
            start += rows
        return pieces

    def _start(self, parquet: pq.ParquetFile, starts: list[int], piece: Slice) -> _Open:
        """At the row group that holds the slice's first row."""
        group = _group_of(starts, piece.first_row)
        first_row = starts[group] if starts else 0
        return _Open(piece.file, parquet, starts, _batches(parquet, group, self._columns), first_row)

    def _open_file(self, file: str) -> pq.ParquetFile:
        try:
            source = self._filesystem.open_input_file(f"{self._root.rstrip('/')}/{file}")
            # Buffered, not pre-buffered: the memory is some pages a column, not a row group.
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: cannot be opened any more: {error}") from None

    def _plain(self, name: str, column: "pa.ChunkedArray[pa.Scalar[Any]]") -> "pa.ChunkedArray[pa.Scalar[Any]]":
        return column.cast(self._types.get(name, normalise(column.type)))


def _group_of(starts: list[int], row: int) -> int:
    """Number of the row group that holds the row."""
    return max(0, bisect_right(starts, row) - 1)


def _batches(parquet: pq.ParquetFile, first_group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(first_group, parquet.metadata.num_row_groups):
        yield from parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)


def _row_groups(parquet: pq.ParquetFile) -> Iterator[int]:
    """Rows of each row group."""
    metadata = parquet.metadata
    for group in range(metadata.num_row_groups):
        yield metadata.row_group(group).num_rows
