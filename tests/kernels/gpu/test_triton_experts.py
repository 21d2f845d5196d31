"""Tests of the experts' GEMMs against their references and, with route and combine, against the CPU's experts."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.activation import GELU, SWIGLU, Activation
from moray.kernels.cpu.experts import experts_ref
from moray.kernels.gpu.combine import combine
from moray.kernels.gpu.experts_down import experts_down, experts_down_ref
from moray.kernels.gpu.experts_up import experts_up, experts_up_ref, interleave
from moray.kernels.gpu.route import Routing, route
from moray.kernels.gpu.tuning import TileConfig

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
CLAMPED = Activation("clamped_swiglu", 0.7)
TILE = TileConfig(16, 32, 32, 2, 4, 2)


def made(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def routed(
    logits: Tensor, top_k: int = 2, block_m: int = 16, num_tokens: int | None = None, method: str = "softmax"
) -> Routing:
    count = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    return route(logits, method=method, top_k=top_k, jitter=0.01, block_m=block_m, num_tokens=count)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill new memory with NaN."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def patterns(dtype: torch.dtype) -> dict[str, Routing]:
    to_one = torch.zeros(19, 4, dtype=dtype, device=DEVICE)
    to_one[:, 2] = 9
    random = made(19, 4, dtype=dtype, seed=1, scale=2)
    return {
        "random": routed(random),
        "all to one, the others empty": routed(to_one, top_k=1),
        "one token": routed(random[:1]),
        "every expert": routed(random[:5], top_k=4),
        "padding": routed(random, num_tokens=11),
        "padding alone": routed(random[:3], num_tokens=0),
        "no token": routed(random[:0]),
        "large blocks": routed(random, block_m=32),
    }


def real_rows(routing: Routing) -> Tensor:
    has_expert = routing.tile_experts.repeat_interleave(routing.block_m) >= 0
    return has_expert & (routing.sorted_rows < routing.topk_ids.numel())


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *((pattern, torch.bfloat16) for pattern in patterns(torch.float16)),
        ("random", torch.float16),
        *(
            pytest.param(name, torch.float16, marks=pytest.mark.slow)
            for name in patterns(torch.float16)
            if name != "random"
        ),
    ],
)
def test_gated_up_and_down(pattern: str, dtype: torch.dtype) -> None:
    routing = patterns(dtype)[pattern]
    x = made(len(routing.topk_ids), 64, dtype=dtype, seed=2)
    up = made(4, 96, 64, dtype=dtype, seed=3, scale=0.1)
    down = made(4, 64, 48, dtype=dtype, seed=4, scale=0.1)
    real = real_rows(routing)
    hidden = experts_up(x, up, routing, None, SWIGLU, TILE)
    want = experts_up_ref(x, up, routing, None, SWIGLU)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(hidden[real], want[real], **close)
    # Memory that was never written may hold anything.
    hidden[~real] = torch.nan
    got = experts_down(hidden, down, routing, None, TILE)
    torch.testing.assert_close(got, experts_down_ref(hidden, down, routing, None), **close)


@pytest.mark.parametrize("activation", [GELU, CLAMPED], ids=["gelu", "clamped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases(dtype: torch.dtype, activation: Activation) -> None:
    """No block divides the widths."""
    routing = patterns(dtype)["padding"]
    width = 72 * (1 + activation.is_gated)
    x, up = made(19, 40, dtype=dtype, seed=5), made(4, width, 40, dtype=dtype, seed=6, scale=0.1)
    down, up_bias = made(4, 40, 72, dtype=dtype, seed=7, scale=0.1), made(4, width, dtype=dtype, seed=8)
    down_bias = made(4, 40, dtype=dtype, seed=9)
    real = real_rows(routing)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    hidden = experts_up(x, up, routing, up_bias, activation, TILE)
    torch.testing.assert_close(hidden[real], experts_up_ref(x, up, routing, up_bias, activation)[real], **close)
    got = experts_down(hidden, down, routing, down_bias, TILE)
    torch.testing.assert_close(got, experts_down_ref(hidden, down, routing, down_bias), **close)
    assert torch.equal(got[22:], torch.zeros_like(got[22:]))


@pytest.mark.parametrize("activation", [SWIGLU, CLAMPED], ids=["swiglu", "clamped"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_whole_layer_equals_the_cpu_s_experts(dtype: torch.dtype, activation: Activation) -> None:
    """It runs with the tiles that a real layer chooses, and as the backend packs it."""
    x, logits = made(9, 64, dtype=dtype, seed=10), made(9, 4, dtype=dtype, seed=11, scale=2)
    gate_up = made(4, 96, 64, dtype=dtype, seed=12, scale=0.1)
    down = made(4, 64, 48, dtype=dtype, seed=13, scale=0.1)
    routing = routed(logits, method="sparsemixer")
    biases = made(4, 96, dtype=dtype, seed=22), made(4, 64, dtype=dtype, seed=23)
    up_bias, down_bias = (None, None) if activation == SWIGLU else biases
    interleaved = interleave(*gate_up.chunk(2, dim=1))
    of_up = None if up_bias is None else interleave(*up_bias[..., None].chunk(2, dim=1))[..., 0]
    hidden = experts_up(x, interleaved, routing, of_up, activation)
    rows = experts_down(hidden, down, routing, down_bias)
    got, _ = combine(rows, torch.zeros_like(x), torch.ones_like(x[0]), None, 1e-5, 2)
    on_cpu = (tensor.cpu() for tensor in (x, routing.topk_weights, routing.topk_ids, gate_up, down))
    of_cpu = (None if bias is None else bias.cpu() for bias in (up_bias, down_bias))
    wanted = experts_ref(*on_cpu, *of_cpu, activation=activation)
    torch.testing.assert_close(got.cpu(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, logits = made(23, 64, dtype=dtype, seed=14), made(23, 4, dtype=dtype, seed=15, scale=2)
    up = made(4, 96, 64, dtype=dtype, seed=16, scale=0.1)
    down = made(4, 64, 48, dtype=dtype, seed=17, scale=0.1)

    def layer(tokens: Tensor, num_tokens: int | None = None, block_m: int = 16) -> Tensor:
        routing = routed(logits[tokens], num_tokens=num_tokens, block_m=block_m)
        tile = replace(TILE, block_m=block_m)
        return experts_down(
            experts_up(x[tokens], up, routing, None, SWIGLU, tile), down, routing, None, tile
        ).unflatten(0, (-1, 2))

    everything = torch.arange(23, device=DEVICE)
    together = layer(everything)
    for token in (0, 11, 22):
        assert torch.equal(layer(everything[token : token + 1])[0], together[token])
    shuffled = torch.randperm(23, generator=torch.Generator().manual_seed(18)).to(DEVICE)
    assert torch.equal(layer(shuffled), together[shuffled])
    assert torch.equal(torch.cat([layer(everything[:9]), layer(everything[9:])]), together)
    assert torch.equal(layer(everything, num_tokens=7)[:7], together[:7])
    for block_m in (32, 64, 128):
        assert torch.equal(layer(everything, block_m=block_m), together)


def test_every_block_is_multiplied_once_whatever_the_order_of_blocks() -> None:
    dtype = torch.float16
    x, up = made(37, 32, dtype=dtype, seed=19), made(2, 64, 32, dtype=dtype, seed=20, scale=0.1)
    routing = routed(made(37, 2, dtype=dtype, seed=21))
    real = real_rows(routing)
    results = [experts_up(x, up, routing, None, SWIGLU, replace(TILE, group_m=group_m)) for group_m in (1, 2, 8)]
    want = experts_up_ref(x, up, routing, None, SWIGLU)[real]
    for result in results:
        torch.testing.assert_close(result[real], want, atol=2e-3, rtol=2e-3)
