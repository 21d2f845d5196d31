"""ShardReader reads the rows of one shard after the other, of files of any format."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import fs

from moray.batch.input.casts import cast
from moray.batch.input.column_types import normalise
from moray.batch.input.file_access import FileAccess
from moray.batch.input.hive import hive_field, read_keys
from moray.batch.input.layout import PARQUET, Layout
from moray.batch.input.line_rows import LineRows
from moray.batch.input.parquet_rows import ParquetRows
from moray.batch.json_values import JSON_KINDS
from moray.batch.shards import Slice


class ShardReader:
    """Reads `columns` of the files below `root`, each cast to its type in `schema` or to the plain form of its own.

    A shard that continues where the last one ended costs only its own rows, however large its row group is. Any other
    shard also costs the rows before it in its row group.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        root: str,
        columns: Sequence[str],
        schema: pa.Schema,
        layout: Layout = PARQUET,
    ) -> None:
        self._columns = list(columns)
        self._fields = {name: schema.field(name) for name in columns if name in schema.names}
        self._keys = frozenset(name for name in columns if name in layout.hive_keys)
        self._access = FileAccess(filesystem, root)
        stored = [name for name in columns if name not in layout.hive_keys]
        self._rows: ParquetRows | LineRows = (
            ParquetRows(self._access, stored)
            if layout.format == "parquet"
            else LineRows(self._access, stored, self._fields)
        )

    def expect(self, identities: Mapping[str, str]) -> None:
        """Set the identities of the files by path, as the job was planned: read() refuses a file with another one."""
        self._access.identities = identities

    def read(self, piece: Slice) -> pa.Table:
        """Read the rows of a slice, with `columns` in order.

        Raises InputError when the file has changed since the job was planned, StoreError when its object store does
        not return it, pa.ArrowException or OSError when its data cannot be read.
        """
        table = self._rows.read(piece)
        keys = read_keys(piece.file) if self._keys else {}
        columns = [
            pa.repeat(pa.scalar(keys[name], pa.string()), piece.num_rows)
            if name in self._keys
            else self._plain(name, table, piece.num_rows)
            for name in self._columns
        ]
        fields = [
            hive_field(name)
            if name in self._keys
            else pa.field(name, column.type, metadata=_json_metadata(table, name))
            for name, column in zip(self._columns, columns, strict=True)
        ]
        return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))

    def split(self, piece: Slice) -> list[Slice]:
        """Cut the slice where row groups end, so that a row group that cannot be decoded fails no rows of others."""
        return self._rows.split(piece)

    def check_reachable(self, piece: Slice) -> None:
        """Raise StoreError where an object store does not return the file's bytes: then its rows are not bad."""
        self._access.check_reachable(piece.file)

    def _plain(self, name: str, table: pa.Table, num_rows: int) -> Any:
        """Return a column in its type; nulls where this file does not have it and other files do."""
        if name not in table.schema.names:
            return pa.chunked_array([pa.nulls(num_rows, self._fields[name].type)])
        column = table.column(name)
        return cast(column, self._fields[name].type if name in self._fields else normalise(column.type))


def _json_metadata(table: pa.Table, name: str) -> dict[bytes, bytes] | None:
    """Return the metadata that says that a column holds JSON text."""
    metadata = (table.schema.field(name).metadata if name in table.schema.names else None) or {}
    return {JSON_KINDS: metadata[JSON_KINDS]} if JSON_KINDS in metadata else None
