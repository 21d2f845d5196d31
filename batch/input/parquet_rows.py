"""ParquetRows reads the rows of Parquet files, one slice after the other, and keeps the file open between them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.input.file_access import FileAccess, Version
from moray.batch.input.footer import INT96_UNIT, identify, read_footer_bytes
from moray.batch.shards import Slice
from moray.engine.errors import InputError

_BATCH_ROWS = 1024  # rows that are decoded at once
_SPAN_ROWS = 4096  # from the first to the last of rows that are picked together
_BUFFER_BYTES = 1 << 20  # buffer of each column's reads


@dataclass
class _OpenFile:
    """Holds a file that is read from row `next_row` on.

    version:  size and modification time when it was opened
    starts:   first row of each row group
    rest:     rows that were decoded and not returned yet
    """

    path: str
    version: Version
    parquet: pq.ParquetFile
    starts: list[int]
    batches: Iterator[pa.RecordBatch]
    next_row: int
    rest: pa.RecordBatch | None = None


class ParquetRows:
    """Reads columns of Parquet files; see ShardReader. A file that lacks a column gives a table without it."""

    def __init__(self, access: FileAccess, columns: Sequence[str]) -> None:
        self._access = access
        self._columns = list(columns)
        self._open: _OpenFile | None = None

    def read(self, piece: Slice) -> pa.Table:
        """Read the rows of a slice; see ShardReader.read."""
        try:
            with self._access.holding_version(piece.file):
                tables = [self._pick(part) for part in _spans(piece)]
            return tables[0] if len(tables) == 1 else pa.concat_tables(tables)
        except BaseException:
            self._open = None
            raise

    def _pick(self, piece: Slice) -> pa.Table:
        if not piece.runs:
            return self._read(piece)
        table = self._read(Slice(piece.file, piece.first_row, piece.end - piece.first_row))
        return table.take(pa.array([row - piece.first_row for row in piece.rows], pa.int64()))

    def _read(self, piece: Slice) -> pa.Table:
        file = self._open
        version = self._access.version(piece.file)
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
        parquet = self._open_file(piece.file, self._access.version(piece.file)[0])
        pieces, start, rows = [], 0, piece.rows
        for num_rows in _row_groups(parquet):
            first, last = bisect_left(rows, start), bisect_left(rows, start + num_rows)
            if first < last:
                pieces.append(Slice.of_rows(piece.file, rows[first:last]))
            start += num_rows
        return pieces

    def _start(self, version: Version, parquet: pq.ParquetFile, starts: list[int], piece: Slice) -> _OpenFile:
        """Start to read at the row group with the slice's first row."""
        group = _group_of(starts, piece.first_row)
        first_row = starts[group] if starts else 0
        return _OpenFile(piece.file, version, parquet, starts, _batches(parquet, group, self._columns), first_row)

    def _open_file(self, file: str, size: int) -> pq.ParquetFile:
        access = self._access
        with access.opening(file):
            footer = read_footer_bytes(access.filesystem, access.path(file), size)
            access.check(file, identify(size, footer))
            source = access.filesystem.open_input_file(access.path(file))
            # Buffered, not pre-buffered: that needs the memory of some pages a column, not of a row group.
            return pq.ParquetFile(
                source,
                metadata=pq.read_metadata(pa.BufferReader(footer)),
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                coerce_int96_timestamp_unit=INT96_UNIT,
                page_checksum_verification=True,
            )


def _spans(piece: Slice) -> Iterator[Slice]:
    """Yield the rows of a slice in parts that span few rows, since all rows between the first and the last are
    decoded."""
    if not piece.runs:
        yield piece
        return
    rows, first = piece.rows, 0
    while first < len(rows):
        last = bisect_left(rows, rows[first] + _SPAN_ROWS)
        yield Slice.of_rows(piece.file, rows[first:last])
        first = last


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
