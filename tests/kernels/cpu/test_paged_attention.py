import math
import random
from dataclasses import dataclass
from mmap import mmap

import pytest
import torch

from moray.kernels.cpu import paged_attention as module
from moray.kernels.cpu.paged_attention import (
    CpuAttentionMetadata,
    new_key_cache,
    new_value_cache,
    paged_attention,
    paged_attention_ref,
)
from moray.kernels.e4m3 import KvScales

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = ((8, 2, 64), (4, 4, 80), (6, 2, 32), (4, 1, 96), (3, 1, 128))  # heads, kv heads, head_dim


@dataclass
class Story:
    """The queries, keys and values of a sequence from its first token on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.q)


def make_story(length: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Story:
    g = torch.Generator().manual_seed(1000 * length + seed)
    heads, kv_heads, head_dim = shape
    widths = (heads, kv_heads, kv_heads)
    return Story(*(torch.randn(length, n, head_dim, generator=g).to(dtype) for n in widths))


class Cache:
    """A paged cache of one layer whose blocks are in random order."""

    def __init__(self, stories: list[Story], block_size: int = 16, seed: int = 0) -> None:
        self.stories, self.block_size = stories, block_size
        self.scales: KvScales | None = None
        self.read_scales: KvScales | None = None  # those of another cache, for tests of mistakes
        counts = [-(-len(story) // block_size) for story in stories]
        free = list(range(sum(counts) + 2))
        random.Random(seed).shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        _, kv_heads, head_dim = stories[0].k.shape
        shape = (sum(counts) + 2, kv_heads, block_size, head_dim)
        self.k, self.v = (new(*shape, stories[0].k.dtype) for new in (new_key_cache, new_value_cache))

    def quantize(self, scales: torch.Tensor) -> None:
        """Store e4m3 from now on. scales: [2, kv_heads]"""
        self.scales = self.read_scales = KvScales.of(scales)
        self.k, self.v = (new(*self.k.shape, torch.float8_e4m3fn) for new in (new_key_cache, new_value_cache))

    def step(
        self,
        spans: dict[int, tuple[int, int]],
        window: int | None = None,
        plain: bool = False,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run tokens start..stop of each sequence; return their outputs, one sequence after the other."""
        batch = CpuAttentionMetadata.build(
            [stop - start for start, stop in spans.values()],
            [stop for _, stop in spans.values()],
            [self.tables[i] for i in spans],
            self.block_size,
        )
        q, k, v = (
            torch.cat([getattr(self.stories[i], name)[start:stop] for i, (start, stop) in spans.items()])
            for name in "qkv"
        )
        if self.scales is not None:
            k, v = self.scales.quantize(k, 0), self.scales.quantize(v, 1)
        blocks, offsets = batch.slots // self.block_size, batch.slots % self.block_size
        self.k[blocks, :, offsets], self.v[blocks, :, offsets] = k, v
        op = paged_attention_ref if plain else paged_attention
        return op(q, self.k, self.v, batch, q.shape[-1] ** -0.5, window, sinks, self.read_scales)


def whole(story: Story, window: int | None = None) -> torch.Tensor:
    return Cache([story]).step({0: (0, len(story))}, window)


@pytest.mark.parametrize("window", [None, 3, 70, 200])
@pytest.mark.parametrize("block_size", [4, 16, 5, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape: tuple[int, int, int], block_size: int, window: int | None) -> None:
    lengths, queries = (1, 300, 17, 90, 100, 64, 700), (1, 1, 17, 40, 5, 1, 100)
    for dtype, tolerance in TOLERANCE.items():
        cache = Cache([make_story(n, shape, dtype) for n in lengths], block_size)
        cache.step({i: (0, n) for i, n in enumerate(lengths)}, window)
        spans = {i: (n - m, n) for i, (n, m) in enumerate(zip(lengths, queries, strict=True))}
        got, want = cache.step(spans, window), cache.step(spans, window, plain=True)
        assert got.dtype == dtype
        assert (got.float() - want.float()).abs().max() < tolerance * want.float().abs().max()


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_sinks(shape: tuple[int, int, int], window: int | None) -> None:
    """A sink is one more score of its head, without a value; in chunks it counts once, and gives the same bits."""
    sinks = torch.linspace(-3, 6, shape[0])
    for dtype, tolerance in TOLERANCE.items():
        story = make_story(200, shape, dtype)
        cache = Cache([story])
        whole = cache.step({0: (0, 200)}, window, sinks=sinks)
        want = cache.step({0: (0, 200)}, window, sinks=sinks, plain=True)
        assert (whole.float() - want.float()).abs().max() < tolerance * want.float().abs().max()
        cut = Cache([story], seed=1)
        parts = [
            cut.step({0: span}, window, sinks=sinks) for span in ((0, 1), (1, 63), (63, 130), (130, 199), (199, 200))
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_the_reference_of_sinks_is_a_key_that_has_no_value() -> None:
    story = make_story(30, SHAPES[1], torch.float32)
    cache = Cache([story])
    got = cache.step({0: (0, 30)}, plain=True, sinks=torch.tensor([0.5, -1e30, 2.0, 1e4]))
    scores = torch.einsum("qhd,khd->hqk", story.q, story.k) * SHAPES[1][2] ** -0.5
    weights = scores.masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).exp()
    for head, weight in enumerate((math.exp(0.5), 0.0, math.exp(2.0))):
        total = weights[head].sum(-1, keepdim=True) + weight
        torch.testing.assert_close(got[:, head], weights[head] / total @ story.v[:, head], atol=1e-5, rtol=0)
    assert not got[:, 3].any(), "a large sink takes all of the weight"


def test_a_window_of_one_sees_the_query_itself_alone() -> None:
    story = make_story(40, SHAPES[0], torch.float32)
    assert torch.equal(whole(story, window=1), story.v.repeat_interleave(4, dim=1))


def test_large_scores_stay_finite_in_float16() -> None:
    story = make_story(40, SHAPES[1], torch.float16)
    loud = Story(story.q * 200, story.k * 200, story.v)
    cache = Cache([loud])
    got = cache.step({0: (0, 40)})
    assert got.isfinite().all()
    assert torch.allclose(got.float(), cache.step({0: (0, 40)}, plain=True).float(), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 50])
def test_a_query_does_not_depend_on_its_chunk(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    """Decoding, chunks of every size and one whole prefill give the same bits."""
    story = make_story(150, shape, dtype)
    want = whole(story, window)
    for chunk in (1, 2, 7, 15, 16, 17, 33, 64, 100, 149):
        cache = Cache([story], seed=chunk)
        parts = [cache.step({0: (i, min(i + chunk, 150))}, window) for i in range(0, 150, chunk)]
        assert torch.equal(torch.cat(parts), want), chunk


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_does_not_depend_on_the_threads(shape: tuple[int, int, int]) -> None:
    before = torch.get_num_threads()
    story = make_story(170, shape, torch.float32)
    want = whole(story)
    try:
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(whole(story), want)
            cache = Cache([story])
            cache.step({0: (0, 160)})
            decoded = torch.cat([cache.step({0: (i, i + 1)}) for i in range(160, 170)])
            assert torch.equal(decoded, want[160:])
    finally:
        torch.set_num_threads(before)


def test_blocks_far_into_a_large_cache() -> None:
    """Numbers of the last blocks lie beyond 2^31. The memory is mapped, and what is never touched takes no room."""
    story = make_story(40, (2, 1, 64), torch.float16)
    want = whole(story)
    cache = Cache([story])
    num_blocks = 2**31 // (16 * 64) + 10
    k, v = (torch.frombuffer(mmap(-1, num_blocks * 16 * 64 * 2), dtype=torch.float16) for _ in "kv")
    cache.k, cache.v = k.view(num_blocks, 1, 64, 16).transpose(2, 3), v.view(num_blocks, 1, 16, 64)
    cache.tables = [[num_blocks - 1, num_blocks - 7, num_blocks - 2]]
    assert torch.equal(cache.step({0: (0, 40)}), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_do_not_depend_on_the_chunk(dtype: torch.dtype, window: int | None) -> None:
    story = make_story(2100, (4, 1, 32), dtype)
    want = whole(story, window)
    cache = Cache([story])
    ends = (1, 500, 513, 1020, 1500, 2099, 2100)
    parts = [cache.step({0: span}, window) for span in zip((0, *ends), ends, strict=False)]
    assert torch.equal(torch.cat(parts), want)
    assert (want.float() - cache.step({0: (0, 2100)}, window, plain=True).float()).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_does_not_depend_on_its_neighbours(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rng = random.Random(3)
    lengths = [1, 5, 30, 64, 65, 130, 200, 640]
    stories = [make_story(n, shape, dtype) for n in lengths]
    alone = [whole(story) for story in stories]
    for trial in range(6):
        cache, done = Cache(stories, seed=trial), [0] * len(stories)
        while any(n < length for n, length in zip(done, lengths, strict=True)):
            present = [i for i, n in enumerate(lengths) if done[i] < n and rng.random() < 0.8]
            rng.shuffle(present)
            spans = {i: (done[i], min(lengths[i], done[i] + rng.choice((1, 1, 4, 17, 90, 300)))) for i in present}
            if not spans:
                continue
            out = torch.split(cache.step(spans), [stop - start for start, stop in spans.values()])
            for (i, (start, stop)), part in zip(spans.items(), out, strict=True):
                assert torch.equal(part, alone[i][start:stop]), (trial, i, start, stop)
                done[i] = stop


def test_many_decodes_equal_one() -> None:
    """The tensors are so large that torch uses several threads."""
    shape = (16, 4, 64)
    stories = [make_story(n, shape, torch.bfloat16, seed) for seed, n in enumerate(range(60, 220, 4))]
    cache = Cache(stories)
    cache.step({i: (0, len(story) - 1) for i, story in enumerate(stories)})
    spans = {i: (len(story) - 1, len(story)) for i, story in enumerate(stories)}
    together = cache.step(spans)
    for i, span in spans.items():
        assert torch.equal(cache.step({i: span}), together[i : i + 1])


def test_small_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = [make_story(n, SHAPES[0], torch.float32) for n in (700, 40, 90)]
    spans = {0: (500, 700), 1: (0, 40), 2: (89, 90)}
    want = Cache(stories).step(spans)
    monkeypatch.setattr(module, "MIN_SHARED_PRODUCTS", 0)
    for pieces in (1, 2, 7, 200):
        monkeypatch.setattr(module, "PIECES_PER_CORE", pieces)
        assert torch.equal(Cache(stories).step(spans), want)


def test_what_a_block_held_before_does_not_matter() -> None:
    story = make_story(20, SHAPES[0], torch.float32)
    cache = Cache([story])
    for stale in (cache.k, cache.v):
        stale.fill_(float("nan"))
    assert torch.equal(cache.step({0: (0, 20)}), whole(story))


def test_a_poisoned_sequence_poisons_only_itself() -> None:
    stories = [make_story(20, SHAPES[0], torch.float32, seed) for seed in range(3)]
    alone = [whole(story) for story in stories]
    stories[1].k[7] = stories[1].v[3] = float("nan")
    out = Cache(stories).step({0: (0, 20), 1: (0, 20), 2: (0, 20)})
    assert torch.equal(out[:20], alone[0]) and torch.equal(out[40:], alone[2])
    assert out[27:40].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 70])
def test_a_cache_of_e4m3_is_read_with_the_scales_of_each_head(dtype: torch.dtype, window: int | None) -> None:
    lengths, sinks = (1, 300, 17, 130), torch.linspace(-3, 3, 6)
    scales = torch.tensor([[0.02, 0.3], [0.5, 0.011]])
    cache = Cache([make_story(n, (6, 2, 32), dtype) for n in lengths])
    cache.quantize(scales)
    whole = cache.step({i: (0, n) for i, n in enumerate(lengths)}, window, sinks=sinks)
    spans = {i: (max(0, n - 20), n) for i, n in enumerate(lengths)}
    got, want = (cache.step(spans, window, plain, sinks) for plain in (False, True))
    assert (got.float() - want.float()).abs().max() < TOLERANCE[dtype] * want.float().abs().max()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [
        row for end, (start, stop) in zip(ends, spans.values(), strict=True) for row in range(end - stop + start, end)
    ]
    assert torch.equal(whole[rows], got), "the bits do not depend on the chunk"

    for mistake, others in {
        "of another head": scales.flip(1),
        "of values for keys": scales.flip(0),
        "not applied to values": torch.stack((scales[0], torch.ones(2))),
    }.items():
        cache.read_scales = KvScales.of(others)
        difference = cache.step(spans, window, sinks=sinks).float() - want.float()
        assert difference.abs().max() > 10 * TOLERANCE[dtype] * want.float().abs().max(), mistake


def test_a_value_that_is_no_number_poisons_what_comes_after_it_in_e4m3_too() -> None:
    story = make_story(40, (4, 2, 32), torch.bfloat16)
    story.v[20] = torch.nan
    cache = Cache([story])
    cache.quantize(torch.ones(2, 2))
    cache.step({0: (0, 40)})
    assert not cache.step({0: (10, 16)}).isnan().any()
    assert cache.step({0: (20, 40)}).isnan().all()
