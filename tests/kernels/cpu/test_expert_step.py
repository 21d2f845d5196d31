"""Tests of all experts in one compiled call: the same bits as one product after the other, whatever the routing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Barrier
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moray.kernels.activation import GELU, SWIGLU, Activation
from moray.kernels.cpu import expert_step as module
from moray.kernels.cpu.experts import PackedExpert, PackedExperts, experts
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.linear import PLAIN, pack, paths
from moray.kernels.cpu.linear_mistakes import Quantization, make_quantized
from moray.kernels.cpu.panels import KERNELS
from moray.kernels.cpu.quantized import PackedQuantized, pack_quantized
from moray.kernels.cpu.quantized_calls import describe

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 200, 136, 16
CLAMPED = Activation("clamped_swiglu", 0.7)
every_activation = pytest.mark.parametrize(
    "activation", [SWIGLU, CLAMPED, GELU], ids=["gated", "clamped with biases", "with biases"]
)
MOST_CORES = 7  # more than some machines have, so that threads wait for others that do not run
KEYS = [key for key in KERNELS if key[0] in isas()]
every_kernel = pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]} {key[1]}".replace("torch.", ""))

pytestmark = pytest.mark.skipif(not KEYS, reason="no kernels of our own on this CPU")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share even the smallest work among the cores."""
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    monkeypatch.setattr(module, "MIN_SHARED_BYTES", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def make(
    path: str, dtype: torch.dtype, activation: Activation, num_experts: int = NUM_EXPERTS
) -> tuple[PackedExpert, ...]:
    g = torch.Generator().manual_seed(num_experts)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(outputs, inputs, generator=g) * inputs**-0.5
        return weight.to(dtype), torch.randn(outputs, generator=g).to(dtype)

    packed = []
    for _ in range(num_experts):
        shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        made = (linear(*shape) for shape in shapes)
        gate, up, down = (pack(w, None if activation == SWIGLU else bias, path) for w, bias in made)
        packed.append(PackedExpert(gate if activation.is_gated else None, up, down, activation))
    return tuple(packed)


def inputs(ids: Tensor, dtype: torch.dtype, width: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(ids.numel())
    return torch.randn(len(ids), width, generator=g).to(dtype), torch.rand(ids.shape, generator=g), ids


def check(packed: tuple[PackedExpert, ...], ids: Tensor, dtype: torch.dtype, cores: tuple[int, ...]) -> None:
    """Compare with one product after the other, the counts of tokens too."""
    together = PackedExperts(packed)
    assert together.table(dtype) is not None
    x, weights, ids = inputs(ids, dtype, packed[0].up.in_features)
    counted, expected = torch.full((len(packed),), 3), torch.full((len(packed),), 3)
    want = experts(x, weights, ids, packed, expected)
    for number in cores:
        torch.set_num_threads(number)
        got = experts(x, weights, ids, together, counted)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), number
        assert torch.equal(counted, expected)
        counted.fill_(3)


@every_kernel
@every_activation
def test_bits_are_those_of_one_product_after_the_other(key: tuple[str, torch.dtype], activation: Activation) -> None:
    packed = make(*key, activation)
    for num_tokens, top_k in ((1, 1), (1, 2), (2, 8), (16, 2), (70, 3)):
        g = torch.Generator().manual_seed(num_tokens)
        ids = torch.rand(num_tokens, NUM_EXPERTS, generator=g).argsort(dim=1)[:, :top_k]
        check(packed, ids, key[1], (1, 2, MOST_CORES))


def test_all_tokens_to_one_expert() -> None:
    path, dtype = KEYS[0]
    for e in (0, 7, NUM_EXPERTS - 1):
        check(make(path, dtype, SWIGLU), torch.full((90, 1), e), dtype, (1, 2, MOST_CORES))


def test_many_small_experts() -> None:
    path, dtype = KEYS[0]
    packed = make(path, dtype, SWIGLU, 128)
    for num_tokens in (1, 33):
        g = torch.Generator().manual_seed(num_tokens)
        ids = torch.rand(num_tokens, 128, generator=g).argsort(dim=1)[:, :8]
        check(packed, ids, dtype, (1, 2, MOST_CORES))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_routing(data: st.DataObject) -> None:
    path, dtype = KEYS[0]
    top_k = data.draw(st.integers(1, 4))
    chosen = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=top_k, max_size=top_k, unique=True)
    ids = torch.tensor(data.draw(st.lists(chosen, min_size=1, max_size=40)))
    activation = data.draw(st.sampled_from([SWIGLU, CLAMPED, GELU]))
    check(make(path, dtype, activation), ids, dtype, (data.draw(st.integers(1, MOST_CORES)),))


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    path, dtype = KEYS[0]
    packed = PackedExperts(make(path, dtype, SWIGLU))
    ids = torch.rand(20, NUM_EXPERTS).argsort(dim=1)[:, :2]
    x, weights, ids = inputs(ids, dtype)
    clean = experts(x, weights, ids, packed)
    x[3], x[11, 5] = torch.inf, torch.nan
    got = experts(x, weights, ids, packed)
    others = [i for i in range(20) if i not in (3, 11)]
    assert torch.equal(got[others], clean[others]) and not got[[3, 11]].isfinite().any()


def test_weights_of_another_path_are_multiplied_one_after_the_other() -> None:
    path, dtype = KEYS[0]
    own = make(path, dtype, SWIGLU)
    other = PackedExpert(own[3].gate, own[3].up, pack(torch.randn(HIDDEN, INTERMEDIATE).to(dtype), None, PLAIN), SWIGLU)
    mixed = PackedExperts([*own[:3], other])
    assert mixed.table(dtype) is None
    x, weights, ids = inputs(torch.tensor([[0, 1], [2, 0]]), dtype)
    assert torch.equal(experts(x, weights, ids, mixed), experts(x, weights, ids, PackedExperts(own)))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "fp4"])
@every_activation
def test_quantized_experts(kind: str, activation: Activation) -> None:
    g = torch.Generator().manual_seed(5)

    def quantized(outputs: int, inputs: int) -> PackedQuantized:
        numbers = torch.randn(outputs, inputs, generator=g)
        codes = numbers.to(torch.float8_e4m3fn) if kind == "fp8" else (numbers * 2).round().clamp(-8, 7).to(torch.int8)
        codes = (codes + 8).to(torch.uint8) if kind == "fp4" else codes
        scales = torch.rand(outputs, inputs // 64, generator=g) * inputs**-0.5
        scales = torch.exp2(scales.log2().round()) if kind == "fp4" else scales
        bias = None if activation == SWIGLU else torch.randn(outputs, generator=g)
        return pack_quantized(codes, scales, 64, None, kind, bias)

    packed = tuple(
        PackedExpert(
            quantized(128, 192) if activation.is_gated else None, quantized(128, 192), quantized(192, 128), activation
        )
        for _ in range(NUM_EXPERTS)
    )
    if PackedExperts(packed).table(torch.bfloat16) is None:
        pytest.skip("no quantized kernels of our own on this CPU")
    for num_tokens, top_k in ((1, 2), (5, 8), (40, 2)):
        g.manual_seed(num_tokens)
        ids = torch.rand(num_tokens, NUM_EXPERTS, generator=g).argsort(dim=1)[:, :top_k]
        check(packed, ids, torch.bfloat16, (1, 2, MOST_CORES))


def test_fp8_experts_are_multiplied_one_after_the_other_at_a_level_that_spoils_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = torch.ones(64, 64).to(torch.float8_e4m3fn)
    packed = pack_quantized(codes, torch.ones(64, 1), 64, None, "fp8")
    if describe(packed, torch.bfloat16) is None:
        pytest.skip("no quantized kernels of our own on this CPU")
    monkeypatch.setattr(numba.config, "OPT", 3)
    assert describe(packed, torch.bfloat16) is None


def rows_of(weight: Tensor, part: int, parts: int) -> Tensor:
    return weight.chunk(parts)[part].contiguous()


@every_activation
@pytest.mark.parametrize("how", ["amx", "avx512_bf16", "avx512", "fp32", "int8", "int4", "fp8", "fp4", "plain loop"])
def test_bits_of_split_experts_are_those_of_whole_ones(how: str, activation: Activation) -> None:
    """The parts run one after the other, and are gathered as ranks would do it."""
    dtype = torch.float32 if how == "fp32" else torch.bfloat16
    path = {"fp32": paths(dtype)[0], "plain loop": paths(dtype)[0]}.get(how, how)
    kind = how if how in ("int8", "int4", "fp8", "fp4") else None
    if kind is None and path not in paths(dtype):
        pytest.skip(f"no {path} on this CPU")
    g = torch.Generator().manual_seed(5)
    parts, num_experts = 2, 6

    def codes(outputs: int, inputs: int) -> tuple[Tensor, Tensor, int, Tensor | None, str]:
        assert kind is not None
        return make_quantized(outputs, inputs, Quantization(kind, 64 if kind in ("int4", "fp4") else inputs, False))

    def pack_part(weight: Any, bias: Tensor | None, part: int, of: int) -> Any:
        bias = None if bias is None else rows_of(bias, part, of)
        if kind is None:
            return pack(rows_of(weight, part, of), bias, path)
        of_codes, scales, group_size, _, _ = weight
        return pack_quantized(rows_of(of_codes, part, of), rows_of(scales, part, of), group_size, None, kind, bias)

    def weight(outputs: int, inputs: int) -> Any:
        if kind is not None:
            return codes(outputs, inputs)
        return (torch.randn(outputs, inputs, generator=g) * inputs**-0.5).to(dtype)

    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    biases = [None if activation == SWIGLU else torch.randn(outputs, generator=g).to(dtype) for outputs, _ in shapes]
    weights = [[weight(*shape) for shape in shapes] for _ in range(num_experts)]

    def packed(part: int, of: int) -> list[PackedExpert]:
        made = []
        for of_expert in weights:
            gate, up, down = (pack_part(w, b, part, of) for w, b in zip(of_expert, biases, strict=True))
            made.append(PackedExpert(gate if activation.is_gated else None, up, down, activation))
        return made

    wrap = list if how == "plain loop" else PackedExperts
    whole, of_ranks = wrap(packed(0, 1)), [wrap(packed(part, parts)) for part in range(parts)]
    for num_tokens in (1, 3, 40):
        ids = torch.rand(num_tokens, num_experts, generator=g).argsort(dim=1)[:, :2]
        arguments = inputs(ids, dtype)
        expected = experts(*arguments, whole)
        with ThreadPoolExecutor(parts) as threads:
            meet = [Barrier(parts) for _ in range(2)]
            given: dict[int, Tensor] = {}

            def gather(part: Tensor, rank: int, given: dict[int, Tensor] = given, meet: list[Barrier] = meet) -> Tensor:
                given[rank] = part
                meet[0].wait()
                whole = torch.cat([given[r] for r in range(parts)], dim=1)
                meet[1].wait()
                return whole

            ranks = [
                threads.submit(experts, *arguments, of_ranks[rank], None, partial(gather, rank=rank))
                for rank in range(parts)
            ]
            for rank in ranks:
                assert torch.equal(rank.result().view(torch.uint8), expected.view(torch.uint8)), (num_tokens, rank)
