"""InputFile: what a plan knows of one file of the input."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import pyarrow as pa

from moray.batch.shards import Slice


@dataclass(frozen=True)
class InputFile:
    """Describes a file of the input.

    path:            path relative to the input root
    size:            size in bytes
    row_group_rows:  rows of each row group of a Parquet file; of a file of lines, the rows between two offsets
    identity:        the text that identifies the file's content in the fingerprint
    schema:          the columns; of a file of lines, with the types that they have in all files of the job
    cut_columns:     columns of INT96 timestamps that may have nanoseconds, which are cut
    offsets:         of a file of lines that is not compressed: the byte at which each row group begins
    """

    path: str
    size: int
    num_rows: int
    row_group_rows: tuple[int, ...]
    identity: str
    schema: pa.Schema
    cut_columns: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()

    @cached_property
    def _starts(self) -> list[int]:
        """Return the first row of each row group."""
        return list(accumulate(self.row_group_rows, initial=0))[:-1]

    def anchor(self, row: int) -> tuple[int, int] | None:
        """Return the Slice.anchor of a slice that begins with this row."""
        if not self.offsets:
            return None
        group = bisect_right(self._starts, row) - 1
        return self._starts[group], self.offsets[group]

    def place(self, piece: Slice) -> Slice:
        """Return the slice with its anchor."""
        return replace(piece, anchor=self.anchor(piece.first_row))
