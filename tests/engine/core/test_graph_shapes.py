"""Tests of the shapes in which steps run from graphs: each step has one of little padding, in the memory there is."""

import pytest

from moray.engine.core.graph_shapes import (
    GRAPH_BYTES,
    MAX_GRAPHS,
    MAX_MEMORY_SHARE,
    GraphShape,
    GraphShapes,
    choose_shapes,
    decode_sizes,
    round_up,
    table_widths,
)

GIB = 1 << 30


def choose(
    max_num_seqs: int, tokens: int, max_blocks: int, available: int = 1 << 40, mean_blocks: int | None = None
) -> GraphShapes | None:
    """Choose shapes where a token of the largest step needs 100 KB."""
    pool_bytes = lambda num_tokens: 100_000 * num_tokens  # noqa: E731
    return choose_shapes(max_num_seqs, tokens, max_blocks, available, pool_bytes, mean_blocks)


def test_sizes_and_widths_cover_all() -> None:
    assert decode_sizes(1) == (1,)
    assert decode_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert decode_sizes(41)[-2:] == (40, 41)
    for most in (3, 64, 100, 256, 512, 1000):
        sizes = decode_sizes(most)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most
        assert all(n <= (round_up(n, sizes) or 0) <= max(n + 7, n * 5 / 4) for n in range(1, most + 1))
    assert table_widths(5) == (5,)
    assert table_widths(64) == (64,)
    assert table_widths(65) == (64, 65)
    assert table_widths(8192) == (64, 256, 1024, 4096, 8192)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 32, 100, 256, 1024])
@pytest.mark.parametrize("max_tokens", [5, 100, 2048, 8192])
def test_every_step_up_to_the_limit_has_a_shape_that_holds_it(max_num_seqs: int, max_tokens: int) -> None:
    shapes = choose(max_num_seqs, max(max_tokens, max_num_seqs), 300)
    assert shapes is not None and shapes.max_tokens == min(2048, max(max_tokens, max_num_seqs))
    listed = {shape for width in shapes.widths for shape in shapes.of_width(width)}
    for tokens in range(1, shapes.max_tokens + 1, 1 if shapes.max_tokens < 300 else 13):
        for seqs in {1, 2, 16, 17, max_num_seqs // 2, max_num_seqs, tokens}:
            if not 1 <= seqs <= min(tokens, max_num_seqs):
                continue
            for width in (1, 65, 300):
                shape = shapes.find(tokens, seqs, width)
                assert shape in listed, f"{tokens} tokens of {seqs} sequences"
                assert shape.tokens >= tokens and shape.seqs >= seqs and shape.width >= width
                assert shape.tokens <= max(64, 2 * tokens, shapes.few_seqs, max_num_seqs if seqs > 1 else 0)
    assert shapes.find(shapes.max_tokens + 1, 1, 1) is None
    assert shapes.find(1, 1, 301) is None


def test_few_sequences_have_shapes_of_their_own() -> None:
    shapes = choose(256, 2048, 64)
    assert shapes is not None
    assert shapes.find(300, 3, 10) == GraphShape(512, 16, 64)
    assert shapes.find(200, 17, 10) == GraphShape(224, 224, 64), "the graph of decodes serves"
    assert shapes.find(900, 200, 10) == GraphShape(1024, 256, 64)
    assert shapes.find(200, 200, 10) == GraphShape(224, 224, 64)
    assert len(shapes.of_width(64)) == 32


def test_what_is_captured_at_the_start_has_room() -> None:
    narrow, wide, widest = choose(256, 2048, 64), choose(256, 2048, 256), choose(256, 2048, 8192)
    assert narrow is not None and wide is not None and widest is not None
    assert narrow.max_graphs == 32 and set(narrow.at_start) == set(narrow.of_width(64))
    assert wide.max_graphs == widest.max_graphs == MAX_GRAPHS
    assert set(wide.at_start) == set(widest.at_start) == {*wide.of_width(64), *wide.of_width(256)}
    assert wide.at_start[0] == (2048, 256, 256), "the largest one first"


@pytest.mark.parametrize(
    ("mean_blocks", "first", "second"),
    [(None, 64, 256), (32, 64, 256), (33, 256, 1024), (200, 1024, 4096), (4000, 8192, 4096), (6000, 8192, 4096)],
)
def test_the_lengths_of_a_job_decide_what_is_captured_first(mean_blocks: int | None, first: int, second: int) -> None:
    shapes = choose(256, 2048, 8192, mean_blocks=mean_blocks)
    assert shapes is not None
    assert set(shapes.at_start) == {*shapes.of_width(first), *shapes.of_width(second)}
    scarce = choose(256, 2048, 8192, 4 * GIB, mean_blocks=mean_blocks)
    assert scarce is not None and {shape.width for shape in scarce.at_start} == {first}


def test_memory_is_left_for_graphs_but_little_of_a_small_card() -> None:
    large = choose(256, 2048, 64, 50 * GIB)
    assert large is not None and large.num_bytes == 100_000 * 2048 + 32 * GRAPH_BYTES
    for available in (64 << 20, GIB, 2 * GIB, 3 * GIB, 4 * GIB):
        small = choose(256, 2048, 8192, available)
        if small is not None:
            assert small.num_bytes <= MAX_MEMORY_SHARE * available
            assert small.num_bytes == 100_000 * small.max_tokens + small.max_graphs * GRAPH_BYTES
            assert len(small.at_start) <= small.max_graphs and small.at_start[0].tokens == small.max_tokens
            assert small.find(1, 1, 1) is not None and small.find(small.max_tokens + 1, 2, 1) is None
    less = choose(256, 2048, 8192, 2 * GIB)
    assert less is not None and less.max_tokens < 2048 and less.max_graphs < MAX_GRAPHS
    assert choose(256, 2048, 64, 64 << 20) is None and choose(256, 2048, 64, -1) is None
