"""In which order a job's rows run: what takes long first, so that nothing is left running alone at the end, and rows
that begin alike together, while the prefix cache holds what they share. Pure; answers do not depend on it."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar

from batch.input.footer import InputFile
from batch.planning.plan import Shard, Slice

BLOCK_SIZE = 16  # tokens: what the prefix cache knows prefixes by
MAX_DEPTH = 8  # of groups within groups
STEPS_PER_DOUBLING = 2  # shards that differ by less than a factor of 2 ** 0.5 keep the order of the files


class Row(Protocol):
    """longest: tokens that it may have in the end"""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def longest(self) -> int: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def order_shards(shards: Iterable[Shard], files: Iterable[InputFile]) -> list[Shard]:
    """The largest first, by the bytes of their row groups: how many tokens they are is not known yet. Those of one row
    group stay together, so that it is read once."""
    sizes = {file.path: _Sizes(file) for file in files}

    def step(shard: Shard) -> int:
        num_bytes = sum(sizes[piece.file].of(piece) for piece in shard.slices)
        return round(STEPS_PER_DOUBLING * math.log2(1 + num_bytes))

    return sorted(shards, key=step, reverse=True)  # stable


class _Sizes:
    """How many bytes some rows of a file have: their share of their row groups."""

    def __init__(self, file: InputFile) -> None:
        self._rows = [0, *accumulate(file.row_group_rows)]
        self._bytes = [0, *accumulate(file.row_group_bytes)]

    def of(self, piece: Slice) -> float:
        return self._before(piece.first_row + piece.num_rows) - self._before(piece.first_row)

    def _before(self, row: int) -> float:
        group = min(bisect_right(self._rows, row), len(self._rows) - 1)
        if group == 0:
            return 0.0
        rows, num_bytes = (part[group] - part[group - 1] for part in (self._rows, self._bytes))
        return self._bytes[group - 1] + num_bytes * (row - self._rows[group - 1]) / max(1, rows)


def order_rows(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """Groups of rows that share more blocks with each other than all do, and such groups in them; everywhere that with
    the longest row first."""
    return _group(sorted(rows, key=lambda row: tuple(row.prompt_token_ids)), 0)


def _group(rows: list[AnyRow], depth: int) -> list[AnyRow]:
    """rows: sorted by token ids, so that those that share most are neighbours"""
    shared = [_shared_blocks(one.prompt_token_ids, other.prompt_token_ids) for one, other in pairwise(rows)]
    common = min(shared, default=0)
    if depth == MAX_DEPTH or all(blocks == common for blocks in shared):
        return sorted(rows, key=_shortness)
    starts = [0, *(index for index, blocks in enumerate(shared, 1) if blocks == common), len(rows)]
    groups = [_group(rows[start:end], depth + 1) for start, end in pairwise(starts)]
    groups.sort(key=lambda group: min(map(_shortness, group)))
    return [row for group in groups for row in group]


def _shortness(row: Row) -> int:
    return -row.longest


def _shared_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    """Whole blocks with which both begin."""
    tokens = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(one), len(other)) if tokens is None else tokens) // BLOCK_SIZE
