"""retry: which rows of a finished job to run again, and how their new answers get into the parts that hold them."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.planning.plan import Plan, Shard, Slice
from engine.errors import OutputError

Source = tuple[str, int]  # file and row


def find_failed(
    folder: OutputFolder, plan: Plan, committed: Mapping[int, Counts], codes: Collection[str]
) -> dict[int, Shard]:
    """By shard: the rows that failed with one of the codes, with any where none is given.

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
            found[index] = Shard(index, tuple(_join(rows)))
    return found


def _failed_rows(part: pa.Table, codes: Collection[str]) -> Iterator[Source]:
    for row in part.to_pylist():
        if row["error"] is not None and (not codes or row["error"]["code"] in codes):
            yield row["source_file"], row["source_row"]


def _join(rows: Iterable[Source]) -> Iterator[Slice]:
    """Rows in the order of their shard -> slices, of neighbours together."""
    piece: Slice | None = None
    for file, row in rows:
        if piece is not None and (piece.file, piece.first_row + piece.num_rows) == (file, row):
            piece = Slice(file, piece.first_row, piece.num_rows + 1)
            continue
        if piece is not None:
            yield piece
        piece = Slice(file, row, 1)
    if piece is not None:
        yield piece


def merge(part: pa.Table, again: pa.Table) -> pa.Table:
    """The part with the rows that were run again in the place of what it held of them; both of one schema."""
    new: dict[Source, list[int]] = {}
    for index, source in enumerate(_sources(again), part.num_rows):
        new.setdefault(source, []).append(index)
    taken: list[int] = []
    for index, source in enumerate(_sources(part)):
        if source not in new:
            taken.append(index)
        else:  # all its samples, in the place of its first
            taken += new[source]
            new[source] = []
    assert not any(new.values()), f"rows that the part does not hold: {[source for source, of in new.items() if of]}"
    return pa.concat_tables([part, again]).take(pa.array(taken, pa.int64()))


def _sources(table: pa.Table) -> Iterator[Source]:
    columns: list[list[Any]] = [table[name].to_pylist() for name in ("source_file", "source_row")]
    return zip(*columns, strict=True)
