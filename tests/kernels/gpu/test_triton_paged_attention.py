import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.cpu.paged_attention import CpuAttentionMetadata
from moray.kernels.cpu.paged_attention import paged_attention_ref as cpu_attention_ref
from moray.kernels.e4m3 import KvScales, to_e4m3
from moray.kernels.gpu import paged_attention as module
from moray.kernels.gpu import split_kv
from moray.kernels.gpu.paged_attention import paged_attention, paged_attention_ref

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Shape:
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Step:
    """The arguments of the operation."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor

    def run(
        self,
        window: int | None = None,
        op=paged_attention,
        sinks: Tensor | None = None,
        kv_scales: KvScales | None = None,
    ) -> Tensor:
        scale = self.q.shape[-1] ** -0.5
        args = (self.q, self.k_cache, self.v_cache, self.block_tables, self.query_starts, self.context_lens)
        sinks = None if sinks is None else sinks.to(DEVICE)
        if kv_scales is not None:
            kv_scales = KvScales(kv_scales.scales.to(DEVICE), kv_scales.inverses.to(DEVICE))
        return op(*(a.to(DEVICE) for a in args), scale, window, sinks, kv_scales)[: int(self.query_starts[-1])].cpu()

    def quantized(self, scales: KvScales) -> "Step":
        """Return the step with caches of e4m3; what must not be read stays NaN."""
        k, v = (
            to_e4m3(cache.float() * scales.inverses[row, :, None, None])
            for row, cache in enumerate((self.k_cache, self.v_cache))
        )
        return replace(self, k_cache=k, v_cache=v)


@dataclass(frozen=True)
class Sequence:
    """The queries, keys and values of a sequence from its first token on."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_sequence(length: int, shape: Shape, seed: int = 0) -> Sequence:
    g = torch.Generator().manual_seed(1000 * seed + length)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return Sequence(*(torch.randn(length, n, shape.head_dim, generator=g).to(shape.dtype) for n in heads))


def make_step(sequences: list[Sequence], spans: list[tuple[int, int]], shape: Shape, width: int | None = None) -> Step:
    """Return a step of tokens start..stop of each sequence; memory that the kernel must not read is NaN or garbage."""
    counts = [-(-stop // shape.block_size) for _, stop in spans]
    num_blocks = sum(counts) + 1
    free = list(range(num_blocks))
    random.Random(len(spans)).shuffle(free)
    k, v = (torch.full((num_blocks, shape.block_size, shape.kv_heads, shape.head_dim), float("nan")) for _ in "kv")
    tables = torch.full((len(spans), width or max(counts)), 2**30, dtype=torch.int32)
    for i, (sequence, (_, stop), count) in enumerate(zip(sequences, spans, counts, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        tables[i, :count] = torch.tensor(blocks, dtype=torch.int32)
        positions = torch.arange(stop)
        places = torch.tensor(blocks, dtype=torch.int64)[positions // shape.block_size], positions % shape.block_size
        k[places], v[places] = sequence.k[:stop].float(), sequence.v[:stop].float()
    lengths = torch.tensor([0, *(stop - start for start, stop in spans)])
    return Step(
        torch.cat([s.q[start:stop] for s, (start, stop) in zip(sequences, spans, strict=True)]),
        *(cache.transpose(1, 2).contiguous().to(shape.dtype) for cache in (k, v)),
        tables,
        lengths.cumsum(0).int(),
        torch.tensor([stop for _, stop in spans], dtype=torch.int32),
    )


# decode, a chunk across the edge of a split, padding, the first key of a split, a short prompt, one token, ...
SPANS = [(599, 600), (250, 262), (0, 0), (256, 257), (0, 18), (0, 1), (16, 16), (255, 256), (63, 65)]


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (Shape(), None),
        (Shape(), 1),
        pytest.param(Shape(2, 2, 96, 128), None, marks=pytest.mark.slow),
        pytest.param(Shape(3, 1, 80, 64, torch.float16), None, marks=pytest.mark.slow),
        (Shape(3, 1, 80, 64, torch.float16), 70),
        pytest.param(Shape(8, 2, 128, 32, torch.float32), None, marks=pytest.mark.slow),
        (Shape(2, 1, 64, 256, torch.float32), 256),
    ],
    ids=str,
)
def test_agrees_with_the_reference(shape: Shape, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [make_sequence(max(1, stop), shape, i) for i, (_, stop) in enumerate(SPANS)]
    step = make_step(sequences, SPANS, shape)
    wanted = step.run(window, paged_attention_ref)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 1)
    folded = step.run(window)
    torch.testing.assert_close(folded, wanted, rtol=0, atol=TOLERANCE[shape.dtype])
    monkeypatch.setattr(module, "MAX_PROGRAMS", 2048)
    assert torch.equal(step.run(window), folded), "programs that share splits merge them alike"


@pytest.mark.parametrize(
    ("shape", "window"), [(Shape(8, 1, 64), None), (Shape(3, 1, 80, 64, torch.float16), 128)], ids=str
)
def test_a_sink_counts_once(shape: Shape, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [(599, 600), (250, 262), (0, 0), (0, 1), (255, 256)]
    step = make_step([make_sequence(max(1, stop), shape, i) for i, (_, stop) in enumerate(spans)], spans, shape)
    sinks = torch.linspace(-3, 6, shape.heads)
    wanted = step.run(window, paged_attention_ref, sinks)
    runs = []
    for programs in (1, 16, 2048):
        monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
        runs.append(step.run(window, sinks=sinks))
    torch.testing.assert_close(runs[0], wanted, rtol=0, atol=TOLERANCE[shape.dtype])
    assert torch.equal(runs[1], runs[0]) and torch.equal(runs[2], runs[0]), "programs that share splits count it once"
    assert (step.run(window, paged_attention_ref) - wanted).abs().max() > 10 * TOLERANCE[shape.dtype]


@pytest.mark.parametrize(
    "shape", [Shape(3, 1, 80, 64, torch.float16), pytest.param(Shape(4, 2), marks=pytest.mark.slow)], ids=str
)
def test_many_splits_are_merged_in_runs_of_the_same_bits(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """19 splits are a run of 16 and three more, or four runs of 4 and three more, or merged where they are computed."""
    spans = [(599, 600), (510, 513), (0, 0), (40, 41)]
    step = make_step([make_sequence(max(1, stop), shape, i) for i, (_, stop) in enumerate(spans)], spans, shape)
    monkeypatch.setattr(module, "SPLIT_KEYS", 32)
    runs = []
    for programs, many in ((1, 64), (2048, 64), (2048, 1)):
        monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
        monkeypatch.setattr(split_kv, "MANY_SPLITS", many)
        runs.append(step.run())
    torch.testing.assert_close(runs[0], step.run(op=paged_attention_ref), rtol=0, atol=TOLERANCE[shape.dtype])
    assert torch.equal(runs[1], runs[0]) and torch.equal(runs[2], runs[0])


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (Shape(6, 3, 80, 64, torch.float16), 70),
        pytest.param(Shape(4, 2), None, marks=pytest.mark.slow),
        pytest.param(Shape(8, 2, 128, 32, torch.float32), 200, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_cache_of_e4m3_is_read_with_the_scales_of_each_head(
    shape: Shape, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [(299, 300), (250, 253), (0, 0), (0, 1)]
    step = make_step([make_sequence(max(1, stop), shape, i) for i, (_, stop) in enumerate(spans)], spans, shape)
    numbers = torch.tensor([[0.02, 0.3, 0.004], [0.5, 0.011, 0.06]])[:, : shape.kv_heads]
    scales, sinks = KvScales.of(numbers), torch.linspace(-3, 3, shape.heads)
    step = step.quantized(scales)
    wanted = step.run(window, paged_attention_ref, sinks, scales)
    runs = []
    for programs in (1, 2048):
        monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
        runs.append(step.run(window, sinks=sinks, kv_scales=scales))
    torch.testing.assert_close(runs[0], wanted, rtol=0, atol=TOLERANCE[shape.dtype])
    assert torch.equal(runs[1], runs[0]), "programs that share splits scale alike"

    # What is easily done wrongly is no small difference.
    wrong = {
        "of another head": KvScales.of(numbers.roll(1, 1)),
        "of values for keys": KvScales.of(numbers.flip(0)),
        "not applied to values": KvScales.of(torch.stack((numbers[0], torch.ones_like(numbers[1])))),
    }
    for mistake, others in wrong.items():
        difference = (step.run(window, paged_attention_ref, sinks, others) - wanted).abs().max()
        assert difference > 10 * TOLERANCE[shape.dtype], mistake


def test_the_reference_is_that_of_the_cpu() -> None:
    shape, spans = Shape(4, 2), SPANS[:2]
    step = make_step([make_sequence(stop, shape) for _, stop in spans], spans, shape)
    lengths = [stop - start for start, stop in spans]
    ends = step.context_lens.tolist()
    tables = [row[: -(-n // shape.block_size)].tolist() for row, n in zip(step.block_tables, ends, strict=True)]
    batch = CpuAttentionMetadata.build(lengths, ends, tables, shape.block_size)
    sinks = torch.linspace(-3, 6, 4)
    for window, of_heads in ((None, None), (20, None), (20, sinks)):
        wanted = cpu_attention_ref(step.q, step.k_cache, step.v_cache, batch, shape.head_dim**-0.5, window, of_heads)
        torch.testing.assert_close(step.run(window, paged_attention_ref, of_heads), wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "window"), [pytest.param(torch.bfloat16, None, marks=pytest.mark.slow), (torch.float16, 150)]
)
def test_a_query_has_the_same_bits_however_it_comes(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(dtype=dtype)
    sequence, other = make_sequence(530, shape), make_sequence(600, shape, 1)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 1)
    whole = make_step([sequence], [(0, 530)], shape).run(window)

    chunked = [make_step([sequence], [cut], shape, width=50).run(window) for cut in ((0, 1), (1, 250), (250, 530))]
    assert torch.equal(torch.cat(chunked), whole)

    for programs in (1, 16, 2048):  # each program merges its splits itself; some share splits; one program per split
        monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
        for position in (0, 63, 255, 256, 529):
            decoded = make_step([sequence], [(position, position + 1)], shape, width=60).run(window)
            assert torch.equal(decoded[0], whole[position])
        spans = [(598, 600), (520, 527), (0, 0), (510, 513), (37, 38)]
        together = make_step([other, sequence, other, sequence, sequence], spans, shape).run(window)
        assert torch.equal(together[2:9], whole[520:527])
        assert torch.equal(together[9:], torch.cat((whole[510:513], whole[37:38])))


def test_the_block_size_changes_no_bit() -> None:
    runs = []
    for block_size in (16, 64, 256):
        shape = Shape(block_size=block_size)
        runs.append(make_step([make_sequence(300, shape)], [(270, 300)], shape).run())
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_many_sequences() -> None:
    """query_starts takes several loads, padding is between and after sequences, some tokens belong to no sequence."""
    shape = Shape(1, 1)
    spans = [(i % 20, i % 20 + i % 3 // 2) for i in range(260)] + [(0, 0)] * 5
    sequence = make_sequence(30, shape)
    step = make_step([sequence] * len(spans), spans, shape)
    wanted = step.run(op=paged_attention_ref)
    step.q = torch.cat((step.q, torch.full((9, 1, 64), float("nan"), dtype=shape.dtype)))
    torch.testing.assert_close(step.run(), wanted, rtol=0, atol=1e-2)
