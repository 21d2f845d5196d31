"""The order of a job's rows: nothing lost, long ones first, those that begin alike together."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.planning.order import BLOCK_SIZE, order_rows, order_shards
from batch.planning.plan import Shard, Slice


@dataclass(frozen=True)
class Made:
    name: str
    prompt_token_ids: tuple[int, ...]
    longest: int


def made(name: str, *blocks: int, longest: int = 0) -> Made:
    return Made(name, tuple(block for block in blocks for _ in range(BLOCK_SIZE)), longest)


def names(rows: list[Made]) -> str:
    return "".join(row.name for row in order_rows(rows))


def test_rows_that_share_nothing_go_by_length() -> None:
    assert names([made("a", 1, longest=5), made("b", 2, longest=9), made("c", 3, longest=7)]) == "bca"


def test_equal_ones_keep_an_order_that_does_not_depend_on_that_of_the_file() -> None:
    rows = [made("a", 1), made("b", 2), made("c", 3)]
    assert names(rows) == names(rows[::-1]) == "abc"


def test_rows_that_share_more_than_all_do_stay_together() -> None:
    rows = [
        made("a", 7, 1, 1, longest=5),
        made("b", 7, 2, 2, longest=9),
        made("c", 7, 1, 3, longest=6),
        made("d", 7, 2, 4, longest=1),
        made("e", 7, 3, longest=7),
    ]
    assert names(rows) == "bdeca"


def test_one_row_without_what_the_others_share_changes_nothing_for_them() -> None:
    rows = [made("x", 9, longest=3)]
    rows += [made(name, 7, group, longest=size) for name, group, size in [("a", 1, 5), ("b", 2, 9), ("c", 1, 6)]]
    assert names(rows) == "bcax"


def test_prompts_that_begin_each_other() -> None:
    rows = [made(str(n % 10), *range(n), longest=n) for n in range(30)]
    assert sorted(names(rows)) == sorted(row.name for row in rows)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(0, 9)), max_size=30))
def test_every_row_once_and_groups_in_one_piece(rows: list[tuple[list[int], int]]) -> None:
    given_rows = [made(str(index), *blocks, longest=size) for index, (blocks, size) in enumerate(rows)]
    ordered = order_rows(given_rows)
    assert sorted(row.name for row in ordered) == sorted(row.name for row in given_rows)
    for size in range(1, 4):
        begins = [row.prompt_token_ids[: size * BLOCK_SIZE] for row in ordered]
        whole = [begin for begin in begins if len(begin) == size * BLOCK_SIZE]
        runs = sum(one != other for one, other in zip(begins, [None, *begins], strict=False) if one in whole)
        assert runs == len(set(whole)), f"those that begin with {size} equal blocks are apart"


def files(**groups: list[tuple[int, int]]) -> list[Any]:
    """Files of row groups of (rows, bytes)."""
    return [
        SimpleNamespace(path=path, row_group_rows=[r for r, _ in of], row_group_bytes=[b for _, b in of])
        for path, of in groups.items()
    ]


@pytest.mark.parametrize(
    ("shards", "order"),
    [
        ([("a", 0, 10), ("a", 10, 10), ("b", 0, 10)], [2, 0, 1]),
        ([("a", 0, 20), ("b", 0, 1)], [0, 1]),
        ([("c", 0, 10), ("c", 10, 10), ("c", 5, 10)], [1, 2, 0]),
        ([("a", 19, 1), ("b", 9, 1)], [1, 0]),
        ([("d", 0, 0), ("a", 0, 1)], [1, 0]),
    ],
)
def test_the_largest_shards_first(shards: list[tuple[str, int, int]], order: list[int]) -> None:
    there = files(a=[(20, 2000)], b=[(10, 9000)], c=[(10, 1000), (10, 5000)], d=[])
    made_shards = [Shard(index, (Slice(*piece),)) for index, piece in enumerate(shards)]
    assert [shard.index for shard in order_shards(made_shards, there)] == order


def test_shards_that_hardly_differ_keep_the_order_of_the_files() -> None:
    there = files(a=[(10, 1000)], b=[(10, 1100)], c=[(10, 1050)])
    shards = [Shard(index, (Slice(name, 0, 10),)) for index, name in enumerate("abc")]
    assert [shard.index for shard in order_shards(shards, there)] == [0, 1, 2]
