"""Tests of the combine kernel against its reference."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.gpu.combine import combine, combine_ref

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "top_k", "multiplier"),
    [(1, 64, 2, 1.0), (5, 96, 2, 1.0), (3, 40, 1, 1.0), (2, 256, 4, 1.0), (2, 96, 8, 0.22)],
)
def test_equals_the_reference(
    num_tokens: int, hidden_size: int, top_k: int, multiplier: float, has_bias: bool, dtype: torch.dtype
) -> None:
    rows = made(num_tokens * top_k, hidden_size, dtype=dtype, seed=0)
    residual = made(num_tokens, hidden_size, dtype=dtype, seed=1) + 3
    weight = made(hidden_size, dtype=dtype, seed=2)
    bias = made(hidden_size, dtype=dtype, seed=3) if has_bias else None
    x, normed = combine(rows, residual, weight, bias, 1e-5, top_k, multiplier)
    want_x, want_normed = combine_ref(rows, residual, weight, bias, 1e-5, top_k, multiplier)
    # With a multiplier, a compiler may round the product and the sum together.
    torch.testing.assert_close(x, want_x, atol=0, rtol=0 if multiplier == 1.0 else torch.finfo(dtype).eps)
    torch.testing.assert_close(normed, want_normed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_row_does_not_depend_on_the_others() -> None:
    dtype = torch.bfloat16
    rows, residual = made(14, 96, dtype=dtype, seed=4), made(7, 96, dtype=dtype, seed=5)
    weight, bias = made(96, dtype=dtype, seed=6), made(96, dtype=dtype, seed=7)
    together = combine(rows, residual, weight, bias, 1e-5, 2)
    for token in range(7):
        alone = combine(rows[2 * token : 2 * token + 2], residual[token : token + 1], weight, bias, 1e-5, 2)
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_[token])
