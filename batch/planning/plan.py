"""Which rows go into which shard, and what each shard's part is called. Pure: follows from input and spec alone."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batch.planning.fingerprint import Fingerprint

MAX_SHARD_ROWS = 1000
MAX_SHARD_TOKENS = 256 * 1024
# A small job is cut finer, so that it has progress to show, to share between workers and to keep when it is stopped.
WANTED_SHARDS = 64
MIN_SHARD_ROWS = 16


@dataclass(frozen=True)
class Slice:
    """Rows first_row .. first_row + num_rows - 1 of a file; `file` is relative to the input root."""

    file: str
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Shard:
    """The rows of one part, in order. `index` counts from 0."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.slices)


@dataclass(frozen=True)
class Plan:
    """What a job does, in which parts; the same in every run over the same input and spec."""

    fingerprint: Fingerprint
    shards: tuple[Shard, ...]

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
                "shards": [[list(asdict(piece).values()) for piece in shard.slices] for shard in self.shards],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        value: Mapping[str, Any] = json.loads(text)
        shards = (tuple(Slice(*piece) for piece in slices) for slices in value["shards"])
        return cls(
            fingerprint=Fingerprint.from_json(value["components"]),
            shards=tuple(Shard(index, slices) for index, slices in enumerate(shards)),
        )


def cut_shards(files: Iterable[tuple[str, int]], max_tokens: int) -> tuple[Shard, ...]:
    """Cut the rows of (path, num_rows) into shards, in order.

    max_tokens: most tokens that one row may generate, over its samples
    """
    files = tuple(files)
    wanted = max(MIN_SHARD_ROWS, -(-sum(rows for _, rows in files) // WANTED_SHARDS))
    size = max(1, min(MAX_SHARD_ROWS, MAX_SHARD_TOKENS // max_tokens, wanted))
    return tuple(Shard(index, slices) for index, slices in enumerate(_cut(files, size)))


def _cut(files: Iterable[tuple[str, int]], size: int) -> Iterator[tuple[Slice, ...]]:
    """Slices of `size` rows together; the last group may have fewer."""
    group: list[Slice] = []
    room = size
    for path, num_rows in files:
        first = 0
        while first < num_rows:
            rows = min(room, num_rows - first)
            group.append(Slice(path, first, rows))
            first += rows
            room -= rows
            if room == 0:
                yield tuple(group)
                group, room = [], size
    if group:
        yield tuple(group)
