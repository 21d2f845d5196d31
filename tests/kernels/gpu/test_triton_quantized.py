"""Tests of the GEMMs on quantized weights against fp64 on the weights that the codes stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_device import DEVICE

from moray.kernels.activation import GELU, SWIGLU
from moray.kernels.e2m1 import numbers_of
from moray.kernels.gpu.experts_down import experts_down, experts_down_ref
from moray.kernels.gpu.experts_up import experts_up, experts_up_ref, interleave
from moray.kernels.gpu.linear import linear, linear_ref
from moray.kernels.gpu.packed_weight import PackedWeight, Sizes, empty_packed
from moray.kernels.gpu.quantize_rows import quantize_rows, quantize_rows_ref
from moray.kernels.gpu.route import Routing, route
from moray.kernels.gpu.tuning import TileConfig
from moray.kernels.gpu.weight_formats import PackedFormat

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
TILE = TileConfig(16, 32, 128, 2, 4, 2)


@dataclass(frozen=True)
class Case:
    """A format, the inputs of a group (None = all), and whether there are zero points."""

    format: PackedFormat
    group_size: int | None = None
    has_zeros: bool = False


CASES = [
    Case("int8"),
    Case("int8", 64, has_zeros=True),
    Case("int8", 128),
    Case("int8", 256),
    Case("int4", has_zeros=True),
    Case("int4", 32),
    Case("int4", 64),
    Case("int4", 128, has_zeros=True),
    Case("fp8"),
    Case("fp8", 128),
    Case("fp4", 32),
    Case("fp8_fp8"),
    Case("fp8_fp8", 128),
]
SOME = [Case("int8"), Case("int4", 32, has_zeros=True), Case("fp8", 128), Case("fp4", 32), Case("fp8_fp8")]


def label(case: Case) -> str:
    return f"{case.format}-g{case.group_size}{'-zeros' if case.has_zeros else ''}"


def made(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def weights(case: Case, sizes: Sizes, seed: int, rows: str = "plain") -> tuple[PackedWeight, Tensor]:
    """Return random weights and what they stand for in fp64, [num_experts, n, k]. rows: or "interleaved" """
    generator = torch.Generator().manual_seed(seed)
    num_experts, n, k = sizes
    size = case.group_size or k
    groups = -(-k // size)
    packed = empty_packed(sizes, case.format, case.group_size, has_zeros=case.has_zeros, device=DEVICE)
    wanted = torch.empty(sizes, dtype=torch.float64)
    for expert in range(num_experts):
        if case.format.startswith("fp8"):
            codes = (torch.randn(n, k, generator=generator) * 20).to(torch.float8_e4m3fn)
            scales = (torch.rand(n, groups, generator=generator) + 0.5) / (20 * k**0.5)
        elif case.format == "fp4":
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
            scales = 2.0 ** torch.randint(-8, -4, (n, groups), generator=generator)
        else:
            half = 8 if case.format == "int4" else 128
            codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
            scales = (torch.rand(n, groups, generator=generator) + 0.5) / (half * k**0.5)
        zeros = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8) if case.has_zeros else None
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            shifted = numbers_of(codes)[:, part].double() - (0 if zeros is None else zeros[:, group, None].double())
            wanted[expert, :, part] = shifted * scales[:, group, None].double()
        parts = [None if part is None else part.to(DEVICE) for part in (codes, scales, zeros)]
        if rows == "interleaved":
            parts = [None if part is None else interleave(*part.chunk(2)) for part in parts]
            wanted[expert] = interleave(*wanted[expert].chunk(2))
        assert parts[0] is not None and parts[1] is not None
        packed.set_expert(expert, parts[0], parts[1], parts[2])
    return packed, wanted.to(DEVICE)


@pytest.mark.parametrize("k", [384, 200])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_packed_weights_stand_for_their_codes(case: Case, k: int) -> None:
    """The last block of 200 inputs is not full, and neither is the last group."""
    packed, wanted = weights(case, Sizes(2, 6, k), seed=0)
    torch.testing.assert_close(packed.dequantize().double(), wanted, rtol=1e-7, atol=0)


def test_a_word_holds_inputs_that_are_a_plane_apart() -> None:
    eight = empty_packed(Sizes(1, 1, 256), "int8")
    eight.set_expert(0, torch.arange(256).sub(128).to(torch.int8)[None], torch.ones(1, 1))
    (words,) = eight.weight[0]
    assert words.shape == (64,)
    assert [int(words[5]) >> 8 * i & 0xFF for i in range(4)] == [5, 37, 69, 101]
    assert [int(words[32]) >> 8 * i & 0xFF for i in range(4)] == [128, 160, 192, 224]
    four = empty_packed(Sizes(1, 1, 128), "int4")
    four.set_expert(0, (torch.arange(128) // 16 - 4).to(torch.int8)[None], torch.ones(1, 1))
    assert four.weight.shape == (1, 1, 16)
    assert [int(four.weight[0, 0, 3]) >> 4 * i & 0xF for i in range(8)] == [4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "case", [Case("int8"), Case("int4"), Case("fp8"), Case("fp4"), Case("int8", has_zeros=True)], ids=label
)
def test_every_code_is_multiplied_exactly(case: Case, dtype: torch.dtype) -> None:
    """By the rows of the identity; sums have one term."""
    if case.format == "fp8":
        bits = torch.tensor([bits for bits in range(256) if bits & 0x7F != 0x7F], dtype=torch.uint8)
        codes = bits.view(torch.float8_e4m3fn)
    elif case.format == "fp4":
        codes = torch.arange(16, dtype=torch.uint8)
    else:
        half = 8 if case.format == "int4" else 128
        codes = torch.arange(-half, half, dtype=torch.int8)
    packed = empty_packed(Sizes(1, 1, len(codes)), case.format, has_zeros=case.has_zeros, device=DEVICE)
    zeros = torch.full((1, 1), -7, dtype=torch.int8, device=DEVICE) if case.has_zeros else None
    packed.set_expert(0, codes[None].to(DEVICE), torch.ones(1, 1, device=DEVICE), zeros)
    found = linear(torch.eye(len(codes), device=DEVICE, dtype=dtype), packed, None)[:, 0].float().cpu()
    assert torch.equal(found, (numbers_of(codes) + (7 if case.has_zeros else 0)).to(dtype).float())


@pytest.mark.parametrize(
    ("dtype", "case"), [*((torch.bfloat16, case) for case in CASES), *((torch.float16, case) for case in SOME)], ids=str
)
def test_linear_equals_the_weights_that_codes_stand_for(case: Case, dtype: torch.dtype) -> None:
    for num_tokens, n, k in ((1, 96, 256), (19, 40, 200)):  # edges everywhere
        packed, wanted = weights(case, Sizes(1, n, k), seed=n)
        x, bias = made(num_tokens, k, seed=1, dtype=dtype), made(n, seed=2, dtype=dtype)
        x[:, 3] *= 60  # an outlier, as some inputs are in every row
        rows = x.double()
        if case.format == "fp8_fp8":
            codes, scales = quantize_rows_ref(x)
            rows = codes.double() * scales.double()[:, None]
        expected = (rows @ wanted[0].T + bias.double()).to(dtype)
        for tile in (TILE, None):
            y = linear(x, packed, bias, tile)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
        torch.testing.assert_close(linear_ref(x, packed, bias), expected, atol=TOLERANCE[dtype], rtol=1e-3)


@pytest.mark.parametrize("case", SOME, ids=label)
def test_linear_in_fp32(case: Case) -> None:
    packed, wanted = weights(case, Sizes(1, 48, 160), seed=3)
    x = made(5, 160, seed=4)
    if case.format == "fp8_fp8":
        codes, scales = quantize_rows_ref(x)
        x_wanted = codes.double() * scales.double()[:, None]
    else:
        x_wanted = x.double()
    torch.testing.assert_close(linear(x, packed, None), (x_wanted @ wanted[0].T).float(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new memory with NaN."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def routed(logits: Tensor, top_k: int = 2, block_m: int = 16, num_tokens: int | None = None) -> Routing:
    count = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    return route(logits, method="softmax", top_k=top_k, jitter=0.0, block_m=block_m, num_tokens=count)


def to_one(num_tokens: int) -> Tensor:
    """Logits that send every token to one expert and leave the others empty."""
    logits = torch.zeros(num_tokens, 3, device=DEVICE)
    logits[:, 1] = 9
    return logits


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("pattern", ["padding", "all to one", "one token"])
@pytest.mark.parametrize("case", SOME, ids=label)
def test_gated_experts(case: Case, pattern: str) -> None:
    routing = {
        "padding": lambda: routed(made(11, 3, seed=1, scale=2), num_tokens=8),
        "all to one": lambda: routed(to_one(19), top_k=1),
        "one token": lambda: routed(made(1, 3, seed=2)),
    }[pattern]()
    x = made(len(routing.topk_ids), 160, seed=3, dtype=torch.bfloat16)
    up, up_wanted = weights(case, Sizes(3, 96, 160), seed=4, rows="interleaved")
    down, down_wanted = weights(case, Sizes(3, 72, 48), seed=5)
    hidden = experts_up(x, up, routing, None, SWIGLU, TILE)
    wanted = experts_up_ref(x, up, routing, None, SWIGLU)
    real = (routing.tile_experts.repeat_interleave(16) >= 0) & (routing.sorted_rows < routing.topk_ids.numel())
    torch.testing.assert_close(hidden[real], wanted[real], atol=2e-2, rtol=2e-2)
    hidden = wanted.clone()
    hidden[~real] = torch.nan  # memory that was never written may hold anything
    got = experts_down(hidden, down, routing, None, TILE)
    torch.testing.assert_close(got, experts_down_ref(hidden, down, routing, None), atol=2e-2, rtol=2e-2)
    if case.format != "fp8_fp8":  # from the codes, in fp64
        row = int(real.nonzero()[-1])
        expert, assignment = int(routing.tile_experts[row // 16]), int(routing.sorted_rows[row])
        gate, linear_part = (
            (up_wanted[expert] @ x[assignment // routing.topk_ids.shape[1]].double()).view(-1, 2, 8).transpose(0, 1)
        )
        by_hand = functional.silu(gate.flatten()) * linear_part.flatten()
        torch.testing.assert_close(wanted[row].double(), by_hand, atol=1e-2, rtol=1e-2)
        weight = routing.topk_weights.flatten()[assignment].double()
        by_hand = down_wanted[expert] @ hidden[row].double() * weight
        torch.testing.assert_close(got[assignment].double(), by_hand, atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", SOME, ids=label)
def test_ungated_experts_with_biases(case: Case) -> None:
    """No block divides the widths."""
    routing = routed(made(9, 3, seed=6, scale=2))
    x, up_bias = made(9, 40, seed=7, dtype=torch.float16), made(3, 72, seed=8, dtype=torch.float16)
    case = replace(case, group_size=None)
    up, _ = weights(case, Sizes(3, 72, 40), seed=9)
    down, _ = weights(case, Sizes(3, 40, 72), seed=10)
    down_bias = made(3, 40, seed=11, dtype=torch.float16)
    hidden = experts_up(x, up, routing, up_bias, GELU, TILE)
    wanted = experts_up_ref(x, up, routing, up_bias, GELU)
    real = (routing.tile_experts.repeat_interleave(16) >= 0) & (routing.sorted_rows < routing.topk_ids.numel())
    torch.testing.assert_close(hidden[real], wanted[real], atol=4e-3, rtol=4e-3)
    got = experts_down(wanted, down, routing, down_bias, TILE)
    torch.testing.assert_close(got, experts_down_ref(wanted, down, routing, down_bias), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("case", SOME, ids=label)
def test_a_row_does_not_depend_on_the_others(case: Case) -> None:
    x, logits = made(18, 160, seed=12, dtype=torch.bfloat16), made(18, 2, seed=13, scale=2)
    up, _ = weights(case, Sizes(2, 64, 160), seed=14, rows="interleaved")
    down, _ = weights(case, Sizes(2, 32, 32), seed=15)
    dense, _ = weights(case, Sizes(1, 32, 160), seed=16)

    def layer(tokens: Tensor, block_m: int = 16, block_n: int = 32) -> Tensor:
        routing, tile = routed(logits[tokens], block_m=block_m), replace(TILE, block_m=block_m, block_n=block_n)
        hidden = experts_up(x[tokens], up, routing, None, SWIGLU, tile)
        rows = experts_down(hidden, down, routing, None, tile).unflatten(0, (-1, 2))
        return torch.cat([rows.flatten(1), linear(x[tokens], dense, None, tile)], dim=1)

    everything = torch.arange(18, device=DEVICE)
    together = layer(everything)
    assert torch.equal(layer(everything[17:])[0], together[17])
    shuffled = torch.randperm(18, generator=torch.Generator().manual_seed(17)).to(DEVICE)
    assert torch.equal(layer(shuffled, 32, 64), together[shuffled])
    assert torch.equal(torch.cat([layer(everything[:7]), layer(everything[7:], 128, 64)]), together)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_are_quantized_by_their_largest_number(dtype: torch.dtype) -> None:
    x = made(6, 300, seed=18, dtype=dtype)
    x[1], x[2] = 0.0, x[2] * 1e-3
    x[3, 7] = 1000.0
    codes, scales = quantize_rows(x)
    want_codes, want_scales = quantize_rows_ref(x)
    assert torch.equal(scales, want_scales) and torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert codes[3].float().max() == 448 and scales[1] == 1 and not codes[1].float().any()
    error = (codes.float() * scales[:, None] - x.float()).norm(dim=1) / x.float().norm(dim=1).clamp_min(1e-9)
    assert (error[[0, 2, 4, 5]] < 0.03).all()


def test_numbers_that_are_none_stay_so() -> None:
    x = made(3, 64, seed=19)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    packed, _ = weights(Case("fp8_fp8"), Sizes(1, 16, 64), seed=20)
    y = linear(x, packed, None, TILE)
    assert not y[:2].isfinite().any() and y[2].isfinite().all()
    packed, _ = weights(Case("int8"), Sizes(1, 16, 64), seed=20)
    y = linear(x, packed, None, TILE)
    assert not y[:2].isfinite().any() and y[2].isfinite().all()


@pytest.mark.parametrize(
    ("format", "group_size", "message"),
    [
        ("int8", 48, "groups of 48 inputs; a GPU's kernels multiply groups of 32, 64 or multiples of 128"),
        ("int4", 8, "groups of 8 inputs; a GPU's kernels multiply groups of 16, 32, 64 or multiples of 128"),
        ("fp8_fp8", 64, "groups of 64 inputs; a GPU's kernels multiply groups of multiples of 128"),
    ],
)
def test_groups_that_are_no_whole_planes_are_refused(format: PackedFormat, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty_packed(Sizes(1, 16, 256), format, group_size)


def test_codes_that_are_none_of_the_format_are_refused() -> None:
    four = empty_packed(Sizes(1, 1, 32), "int4", has_zeros=True)
    codes, scales, zeros = torch.full((1, 32), 8, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1).char()
    with pytest.raises(ValueError, match=r"codes of an int4 weight are 8 to 8, beyond -8\.\.7"):
        four.set_expert(0, codes, scales, zeros)
    with pytest.raises(ValueError, match="beyond 100"):
        four.set_expert(0, codes - 1, scales, zeros - 101)
    eight = empty_packed(Sizes(1, 1, 32), "fp8")
    with pytest.raises(ValueError, match="NaN"):
        eight.set_expert(0, torch.full((1, 32), torch.nan).to(torch.float8_e4m3fn), scales)
