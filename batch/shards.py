"""The division of input rows into shards, and the names of their parts.

Pure: it follows from the input and the spec alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Names the rows first_row .. first_row + num_rows - 1 of a file; `file` is relative to the input root.

    anchor:  for a file of lines: a row at or before the first one, and the byte at which its line begins; None = the
             file is read from its start, or says itself where rows are
    """

    file: str
    first_row: int
    num_rows: int
    anchor: tuple[int, int] | None = field(default=None, compare=False)

    def to_json(self) -> list[Any]:
        return [self.file, self.first_row, self.num_rows, *([] if self.anchor is None else [self.anchor])]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Slice":
        file, first_row, num_rows, *anchor = value
        return cls(file, first_row, num_rows, tuple(anchor[0]) if anchor else None)


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


def cut_shards(files: Iterable[tuple[str, int]], max_tokens: int) -> tuple[Shard, ...]:
    """Cut the rows of (path, num_rows) into shards, in order.

    An input without rows gets one shard without rows, so that there is a part to read.

    max_tokens:  maximum number of tokens that one row may generate, over all its samples
    """
    files = tuple(files)
    wanted = max(MIN_SHARD_ROWS, -(-sum(rows for _, rows in files) // WANTED_SHARDS))
    size = max(1, min(MAX_SHARD_ROWS, MAX_SHARD_TOKENS // max_tokens, wanted))
    return tuple(Shard(index, slices) for index, slices in enumerate(_cut(files, size))) or (Shard(0, ()),)


def _cut(files: Iterable[tuple[str, int]], size: int) -> Iterator[tuple[Slice, ...]]:
    """Yield groups of slices that have `size` rows together; the last group may have fewer."""
    group: list[Slice] = []
    rows_free = size
    for path, num_rows in files:
        first = 0
        while first < num_rows:
            rows = min(rows_free, num_rows - first)
            group.append(Slice(path, first, rows))
            first += rows
            rows_free -= rows
            if rows_free == 0:
                yield tuple(group)
                group, rows_free = [], size
    if group:
        yield tuple(group)
