from hypothesis import given
from hypothesis import strategies as st

from moray.batch.fingerprint import Fingerprint
from moray.batch.shards import (
    MAX_SHARD_ROWS,
    MAX_SHARD_TOKENS,
    MIN_SHARD_ROWS,
    WANTED_SHARDS,
    Plan,
    Shard,
    Slice,
    cut_shards,
)

files = st.lists(st.integers(0, 3000), max_size=8).map(
    lambda rows: [(f"{i:02}.parquet", n) for i, n in enumerate(rows)]
)


def test_small_files_are_packed_and_large_ones_cut() -> None:
    assert cut_shards([("a", 10), ("b", 0), ("c", 30)], max_tokens=64) == (
        Shard(0, (Slice("a", 0, 10), Slice("c", 0, 6))),
        Shard(1, (Slice("c", 6, 16),)),
        Shard(2, (Slice("c", 22, 8),)),
    )


def test_shards_of_a_large_job_are_as_large_as_may_be() -> None:
    assert [s.num_rows for s in cut_shards([("a", 100_500)], 64)] == [1000] * 100 + [500]
    assert [s.num_rows for s in cut_shards([("a", 100_500)], 1024)] == [256] * 392 + [148]
    assert [s.num_rows for s in cut_shards([("a", 3)], MAX_SHARD_TOKENS + 1)] == [1, 1, 1]


def test_a_small_job_is_cut_finer() -> None:
    assert {s.num_rows for s in cut_shards([("a", 6400)], 64)} == {6400 // WANTED_SHARDS}
    assert {s.num_rows for s in cut_shards([("a", 64)], 64)} == {MIN_SHARD_ROWS}


def test_no_rows_are_one_empty_shard() -> None:
    assert cut_shards([], 64) == cut_shards([("a", 0)], 64) == (Shard(0, ()),)


@given(files, st.sampled_from([1, 64, 1000, 5000, 300_000]))
def test_every_row_in_one_slice_in_order_within_the_limits(files: list[tuple[str, int]], max_tokens: int) -> None:
    shards = cut_shards(files, max_tokens)
    rows = [(piece.file, row) for shard in shards for piece in shard.slices for row in _rows(piece)]
    assert rows == [(path, row) for path, num_rows in files for row in range(num_rows)]
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        assert (1 if rows else 0) <= shard.num_rows <= MAX_SHARD_ROWS
        assert shard.num_rows <= 1 or shard.num_rows * max_tokens <= MAX_SHARD_TOKENS
        assert all(piece.num_rows > 0 for piece in shard.slices)
    assert len({shard.num_rows for shard in shards[:-1]}) <= 1


def _rows(piece: Slice) -> range:
    return range(piece.first_row, piece.first_row + piece.num_rows)


@given(files)
def test_json_round_trip(files: list[tuple[str, int]]) -> None:
    plan = Plan(Fingerprint({"a": "1 byte"}, {"task": "generate"}), cut_shards(files, 64))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.num_rows == sum(rows for _, rows in files)


def test_part_names() -> None:
    plan = Plan(Fingerprint({}, {}), cut_shards([("a", 20)], 64))
    digits = plan.fingerprint.hexdigest[:8]
    assert [plan.part_name(s) for s in plan.shards] == [
        f"part-{digits}-000000.parquet",
        f"part-{digits}-000001.parquet",
    ]
