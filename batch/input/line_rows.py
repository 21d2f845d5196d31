"""LineRows reads the rows of files of JSON lines, one slice after the other, and keeps the file open between them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from moray.batch.input.file_access import FileAccess, Version
from moray.batch.input.line_file import is_planned
from moray.batch.input.lines import decompress, find_codec, read_lines
from moray.batch.json_values import build_column, decode_object
from moray.batch.shards import Slice
from moray.engine.errors import InputError

_ERRORS = b"moray.errors"  # key in the metadata of a table: the rows that could not be parsed


def read_errors(table: pa.Table) -> dict[int, str]:
    """Return why rows of a table that ShardReader read have no values, by their number in the table."""
    text = (table.schema.metadata or {}).get(_ERRORS)
    return {} if text is None else {int(index): message for index, message in json.loads(text).items()}


@dataclass
class _OpenFile:
    """Holds a file that is read from row `next_row` on."""

    path: str
    version: Version
    source: pa.NativeFile
    lines: Iterator[tuple[int, bytes]]
    next_row: int


def _take(file: _OpenFile, piece: Slice) -> Iterator[bytes]:
    """Yield the lines of a slice, of a file whose next row is the slice's first one."""
    for index, length in enumerate(piece.runs or (piece.num_rows,)):
        for _, line in islice(file.lines, length):
            file.next_row += 1
            if index % 2 == 0:
                yield line


class LineRows:
    """Reads columns of files of JSON lines; see ShardReader.

    A line that is no JSON object gives a row of nulls, which read_errors explains. Columns have their types of
    `fields`; those without one have the type of the values that are read. A slice that does not continue where the last
    one ended costs the lines from its anchor on, in a compressed file all lines before it.

    fields:  column -> its field in the output
    """

    def __init__(self, access: FileAccess, columns: Sequence[str], fields: "Mapping[str, pa.Field[Any]]") -> None:
        self._access = access
        self._columns = columns
        self._fields = fields
        self._open: _OpenFile | None = None
        self._checked: dict[str, tuple[Version, str]] = {}  # file -> its version and identity when it was compared

    def read(self, piece: Slice) -> pa.Table:
        """Read the rows of a slice; see ShardReader.read."""
        try:
            file = self._seek(piece)
            with self._access.reading(piece.file):
                lines = list(_take(file, piece))
            if len(lines) < piece.num_rows:
                raise InputError(
                    f"{piece.file}: ends at row {file.next_row:,}; it had {piece.end:,} or more when planned"
                )
            return self._parse(piece, lines)
        except BaseException:
            self._open = None
            raise

    def split(self, piece: Slice) -> list[Slice]:
        """Return the slice itself: a bad line fails no other rows."""
        return [piece]

    def _seek(self, piece: Slice) -> _OpenFile:
        """Return the file, with the slice's first row as the next one."""
        version, file = self._access.version(piece.file), self._open
        anchor = piece.anchor or (0, 0)
        is_open = file is not None and (file.path, file.version) == (piece.file, version)
        if file is None or not is_open or not anchor[0] <= file.next_row <= piece.first_row:
            file = self._open = self._start(piece.file, version, *anchor)
        with self._access.reading(piece.file):
            skipped = sum(1 for _ in islice(file.lines, piece.first_row - file.next_row))
        file.next_row += skipped
        return file

    def _start(self, file: str, version: Version, row: int, offset: int) -> _OpenFile:
        access, planned = self._access, self._access.identities.get(file)
        with access.opening(file):
            source = access.filesystem.open_input_file(access.path(file))
            if planned is not None and self._checked.get(file) != (version, planned):
                if not is_planned(source, version[0], planned):
                    raise ValueError("it has been changed since the job was planned")
                self._checked[file] = version, planned
            source.seek(0)
            codec = find_codec(source.read(4))
            source.seek(offset)
            return _OpenFile(file, version, source, read_lines(decompress(source, codec), offset), row)

    def _parse(self, piece: Slice, lines: Sequence[bytes]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        errors: dict[int, str] = {}
        for index, line in enumerate(lines):
            try:
                rows.append(decode_object(line))
            except ValueError as error:
                rows.append({})
                errors[index] = f"row {piece.rows[index]} of {piece.file} is not valid JSON: {error}"
        arrays, fields = [], []
        for name in self._columns:
            try:
                array, field = build_column([row.get(name) for row in rows], self._fields.get(name))
            except (pa.ArrowException, OverflowError) as error:
                raise self._access.changed(piece.file, f"column {name!r}: {error}") from None
            arrays.append(array)
            fields.append(field.with_name(name))
        metadata = {_ERRORS: json.dumps(errors)} if errors else None
        if not fields:
            return pa.table({}, metadata=metadata)
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata))
