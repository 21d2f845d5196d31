"""Tests of the norm kernels against their references."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.gpu import norms
from moray.kernels.gpu.combine import combine

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hidden_size", [64, 96, 1])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_equals_the_reference(name: str, hidden_size: int, dtype: torch.dtype) -> None:
    inputs = [made(5, hidden_size, dtype=dtype, seed=0) * 3 + 1]
    if name.startswith("add"):
        inputs.append(made(5, hidden_size, dtype=dtype, seed=1))
    inputs.append(made(hidden_size, dtype=dtype, seed=2))
    if name.endswith("layer_norm"):
        inputs.append(made(hidden_size, dtype=dtype, seed=3))
    got, want = getattr(norms, name)(*inputs, 1e-5), getattr(norms, f"{name}_ref")(*inputs, 1e-5)
    if name.startswith("add"):
        assert torch.equal(got[0], want[0])
        got, want = got[1], want[1]
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_on_the_cpu(dtype: torch.dtype) -> None:
    """The rows are so small that sums are exact, so every bit must agree."""
    x = torch.tensor([[3.0, -3.0, 1.0, -1.0], [0.5, 0.5, -0.5, -0.5]], dtype=dtype, device=DEVICE)
    weight, bias = made(4, dtype=dtype, seed=0), made(4, dtype=dtype, seed=1)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norms.rms_norm(x, weight, 1e-5), weight * scaled.to(dtype))
    once = (weight * scaled).to(dtype)
    assert torch.equal(norms.rms_norm(x, weight, 1e-5, rounds_last=True), once)
    assert torch.equal(norms.add_rms_norm(x, torch.zeros_like(x), weight, 1e-5, rounds_last=True)[1], once)
    rows = torch.stack((x, torch.zeros_like(x)), dim=1).flatten(0, 1)
    assert torch.equal(combine(rows, torch.zeros_like(x), weight, None, 1e-5, 2, rounds_last=True)[1], once)
    assert not torch.equal(once, weight * scaled.to(dtype))
    shifted = (scaled * weight.float() + bias.float()).to(dtype)  # the mean is 0
    torch.testing.assert_close(norms.layer_norm(x, weight, bias, 1e-5), shifted, atol=0, rtol=torch.finfo(dtype).eps)


def test_large_values_with_a_large_mean() -> None:
    x = made(2, 128, dtype=torch.float32, seed=0) + 1000
    weight, bias = torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    want = norms.layer_norm_ref(x, weight, bias, 1e-5)
    torch.testing.assert_close(norms.layer_norm(x, weight, bias, 1e-5), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, residual = made(7, 96, dtype=dtype, seed=4), made(7, 96, dtype=dtype, seed=5)
    weight, bias = made(96, dtype=dtype, seed=6), made(96, dtype=dtype, seed=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    for add, params in ((norms.add_layer_norm, (weight, bias)), (norms.add_rms_norm, (weight,))):
        together = add(x, residual, *params, 1e-5)
        shuffled = add(x[order], residual[order], *params, 1e-5)
        for i in range(2):
            assert torch.equal(shuffled[i], together[i][order])
            for row in range(7):
                alone = add(x[row : row + 1], residual[row : row + 1], *params, 1e-5)
                assert torch.equal(alone[i][0], together[i][row])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_is_added_is_multiplied_first(dtype: torch.dtype) -> None:
    x, residual, weight = (made(*shape, dtype=dtype, seed=9) for shape in ((3, 96), (3, 96), (96,)))
    got, want = (add(x, residual, weight, 1e-5, 0.22) for add in (norms.add_rms_norm, norms.add_rms_norm_ref))
    torch.testing.assert_close(got[0], want[0], atol=0, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(got[1], want[1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not torch.equal(got[0], norms.add_rms_norm(x, residual, weight, 1e-5)[0])


def test_no_tokens() -> None:
    x, weight = torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert norms.rms_norm(x, weight, 1e-5).shape == (0, 64)
