"""Finds the failed rows of a finished job for a retry, and merges their new answers into the parts that hold them."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.shards import Plan, Shard, Slice
from moray.engine.errors import OutputError

Source = tuple[str, int]  # source_file and source_row


def find_failed(
    folder: OutputFolder, plan: Plan, committed: Mapping[int, Counts], codes: Collection[str]
) -> dict[int, Shard]:
    """Return, by shard, the rows that failed with one of the codes; with any code where `codes` is empty.

    Raises OutputError where a part cannot be read.
    """
    found = {}
    for index, counts in committed.items():
        if counts.failed and (not codes or not counts.errors.keys().isdisjoint(codes)):
            name = plan.part_name(plan.shards[index])
            try:
                with folder.open(name) as file:
                    part = pq.read_table(file, columns=["source_file", "source_row", "error"])
            except OSError as error:
                raise OutputError(folder.explain(error, name, done="read")) from None
            rows = list(_failed_rows(part, codes))
            anchors = {piece.file: piece.anchor for piece in plan.shards[index].slices}
            found[index] = Shard(index, tuple(_join_slices(rows, anchors)))
    return found


def _failed_rows(part: pa.Table, codes: Collection[str]) -> Iterator[Source]:
    for row in part.to_pylist():
        if row["error"] is not None and (not codes or row["error"]["code"] in codes):
            yield row["source_file"], row["source_row"]


def _join_slices(rows: Iterable[Source], anchors: Mapping[str, tuple[int, int] | None]) -> Iterator[Slice]:
    """Join rows, in the order of their shard, into slices of neighbours.

    anchors:  file -> the anchor of the shard's slice of it
    """
    piece: Slice | None = None
    for file, row in rows:
        if piece is not None and (piece.file, piece.first_row + piece.num_rows) == (file, row):
            piece = Slice(file, piece.first_row, piece.num_rows + 1, anchor=piece.anchor)
            continue
        if piece is not None:
            yield piece
        piece = Slice(file, row, 1, anchor=anchors[file])
    if piece is not None:
        yield piece


def merge(part: pa.Table, retried: pa.Table) -> pa.Table:
    """Return the part with the retried rows in place of its own; both tables have the same schema."""
    new: dict[Source, list[int]] = {}
    for index, source in enumerate(_sources(retried), part.num_rows):
        new.setdefault(source, []).append(index)
    kept: list[int] = []
    for index, source in enumerate(_sources(part)):
        if source not in new:
            kept.append(index)
        else:  # all new samples of the row take the place of its first old one
            kept += new[source]
            new[source] = []
    assert not any(new.values()), (
        f"rows that the part does not hold: {[source for source, rows in new.items() if rows]}"
    )
    return pa.concat_tables([part, retried]).take(pa.array(kept, pa.int64()))


def _sources(table: pa.Table) -> Iterator[Source]:
    columns: list[list[Any]] = [table[name].to_pylist() for name in ("source_file", "source_row")]
    return zip(*columns, strict=True)
