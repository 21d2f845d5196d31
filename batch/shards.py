"""The division of input rows into shards, and the names of their parts.

Pure: it follows from the input and the spec alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from moray.batch.fingerprint import Fingerprint

MAX_SHARD_ROWS = 1000
MAX_SHARD_TOKENS = 256 * 1024  # tokens that the rows of a shard may generate together, at most
# A small job is cut into smaller shards, so that it has progress to show, to divide between workers and to keep when it
# is stopped.
WANTED_SHARDS = 64
MIN_SHARD_ROWS = 16


@dataclass(frozen=True)
class Slice:
    """Names rows of a file, in order; `file` is relative to the input root.

    They are first_row .. first_row + num_rows - 1, unless there are runs.

    runs:    where rows between the first and the last one are left out: the lengths of the runs of rows that belong to
             the slice and of those between them that do not, in turn
    anchor:  for a file of lines: a row at or before the first one, and the byte at which its line begins; None = the
             file is read from its start, or says itself where rows are
    """

    file: str
    first_row: int
    num_rows: int
    runs: tuple[int, ...] = ()
    anchor: tuple[int, int] | None = field(default=None, compare=False)

    @classmethod
    def of_rows(cls, file: str, rows: Sequence[int], anchor: tuple[int, int] | None = None) -> "Slice":
        """Return the slice of rows in ascending order; there must be at least one."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return cls(file, rows[0], len(rows), anchor=anchor)
        runs = [1]
        for before, row in pairwise(rows):
            if row == before + 1:
                runs[-1] += 1
            else:
                runs += [row - before - 1, 1]
        return cls(file, rows[0], len(rows), tuple(runs), anchor)

    @property
    def end(self) -> int:
        """Return the row after the last one."""
        return self.first_row + (sum(self.runs) or self.num_rows)

    @property
    def rows(self) -> Sequence[int]:
        """Return the numbers of the rows."""
        if not self.runs:
            return range(self.first_row, self.end)
        found: list[int] = []
        row = self.first_row
        for index, length in enumerate(self.runs):
            if index % 2 == 0:
                found += range(row, row + length)
            row += length
        return found

    def to_json(self) -> list[Any]:
        rest = [] if self.anchor is None and not self.runs else [self.anchor]
        return [self.file, self.first_row, self.num_rows, *rest, *([list(self.runs)] if self.runs else [])]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Slice":
        file, first_row, num_rows, *rest = value
        anchor, runs = (*rest, None, None)[:2]
        return cls(file, first_row, num_rows, tuple(runs or ()), None if anchor is None else tuple(anchor))


@dataclass(frozen=True)
class Shard:
    """Names the rows of one part, in order. `index` counts from 0."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.slices)


@dataclass(frozen=True)
class Plan:
    """States what a job does and in which parts; the same in every run over the same input and spec.

    warnings:  what the job leaves out of the input, and what else a person should know, one line each
    """

    fingerprint: Fingerprint
    shards: tuple[Shard, ...]
    warnings: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def part_name(self, shard: Shard) -> str:
        return f"part-{self.fingerprint.short}-{shard.index:06d}.parquet"

    def to_json(self) -> str:
        return json.dumps(
            {
                "fingerprint": self.fingerprint.hexdigest,
                "num_rows": self.num_rows,
                "num_shards": len(self.shards),
                "components": self.fingerprint.to_json(),
                "warnings": list(self.warnings),
                "shards": [[piece.to_json() for piece in shard.slices] for shard in self.shards],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        value: Mapping[str, Any] = json.loads(text)
        shards = (tuple(map(Slice.from_json, slices)) for slices in value["shards"])
        return cls(
            fingerprint=Fingerprint.from_json(value["components"]),
            shards=tuple(Shard(index, slices) for index, slices in enumerate(shards)),
            warnings=tuple(value.get("warnings", ())),  # older versions of moray wrote none
        )


def cut_shards(files: Iterable[tuple[str, int | Sequence[int]]], max_tokens: int) -> tuple[Shard, ...]:
    """Cut the rows of files into shards, in order.

    An input without rows gets one shard without rows, so that there is a part to read.

    files:       the path of each file with its number of rows, or with the numbers of the rows that the job has
    max_tokens:  maximum number of tokens that one row may generate, over all its samples
    """
    numbered = [(path, range(rows) if isinstance(rows, int) else rows) for path, rows in files]
    wanted = max(MIN_SHARD_ROWS, -(-sum(len(rows) for _, rows in numbered) // WANTED_SHARDS))
    size = max(1, min(MAX_SHARD_ROWS, MAX_SHARD_TOKENS // max_tokens, wanted))
    return tuple(Shard(index, slices) for index, slices in enumerate(_cut(numbered, size))) or (Shard(0, ()),)


def _cut(files: Iterable[tuple[str, Sequence[int]]], size: int) -> Iterator[tuple[Slice, ...]]:
    """Yield groups of slices that have `size` rows together; the last group may have fewer."""
    group: list[Slice] = []
    rows_free = size
    for path, numbers in files:
        first = 0
        while first < len(numbers):
            rows = min(rows_free, len(numbers) - first)
            group.append(Slice.of_rows(path, numbers[first : first + rows]))
            first += rows
            rows_free -= rows
            if rows_free == 0:
                yield tuple(group)
                group, rows_free = [], size
    if group:
        yield tuple(group)
