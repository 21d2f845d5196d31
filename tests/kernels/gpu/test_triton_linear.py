"""Tests of the dense linear kernel against its reference."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.gpu.linear import count_splits, linear, linear_ref
from moray.kernels.gpu.tuning import TileConfig

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
TILES = [TileConfig(16, 64, 64, 8, 4, 3), TileConfig(32, 128, 64, 2, 4, 3), TileConfig(128, 128, 64, 1, 8, 2)]


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "n", "k"),
    [
        (1, 96, 64),
        (3, 64, 40),  # no block of k is full
        (35, 200, 128),  # edges everywhere
        (5, 16, 512),  # a router: the sum over k is split
        (70, 4, 1024),
    ],
)
def test_equals_the_reference(num_tokens: int, n: int, k: int, has_bias: bool, dtype: torch.dtype) -> None:
    x = made(num_tokens, k, dtype=dtype, seed=0)
    weight = made(n, k, dtype=dtype, seed=1) / k**0.5
    bias = made(n, dtype=dtype, seed=2) if has_bias else None
    y = linear(x, weight, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, linear_ref(x, weight, bias), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_is_rounded_once() -> None:
    """Sums of halves are exact in fp32, not in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (9, 512), generator=generator).to(DEVICE, torch.bfloat16) / 2
    weight = torch.randint(-4, 5, (16, 512), generator=generator).to(DEVICE, torch.bfloat16) / 2
    bias = torch.randint(-9, 9, (16,), generator=generator).to(DEVICE, torch.bfloat16) / 4
    assert torch.equal(linear(x, weight, bias), linear_ref(x, weight, bias))


@pytest.mark.parametrize(("n", "k", "dtype"), [(80, 192, torch.float16), (16, 512, torch.bfloat16)])
def test_a_row_does_not_depend_on_the_others(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = made(150, k, dtype=dtype, seed=0), made(n, k, dtype=dtype, seed=1), made(n, dtype=dtype, seed=2)
    if DEVICE == "cpu":  # NumPy's order of sums depends on the position in a block, so use exact sums
        x, weight = x.round(), weight.round()
    together = linear(x, weight, bias)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for tile in (None, *TILES):
        assert torch.equal(linear(x[order], weight, bias, tile), together[order])
        for start, stop in ((0, 1), (17, 18), (149, 150), (0, 7), (7, 74), (74, 150)):
            assert torch.equal(linear(x[start:stop], weight, bias, tile), together[start:stop])


def test_the_split_follows_from_the_weight() -> None:
    assert count_splits(4096, 4096, 64) == count_splits(32064, 4096, 64) == 1
    assert count_splits(16, 4096, 64) == 16
    assert count_splits(4, 2560, 64) == 8
    assert count_splits(16, 96, 64) == 1  # not into whole blocks


def test_no_tokens() -> None:
    assert linear(torch.empty(0, 64, device=DEVICE), torch.empty(8, 64, device=DEVICE), None).shape == (0, 8)
