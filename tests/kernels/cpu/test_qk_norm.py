"""Tests of the norms of queries and keys, in place in the rows of qkv, against the norms of whole rows."""

import pytest
import torch
from torch import Tensor

from moray.kernels.cpu.qk_norm import qk_norm, qk_norm_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def made(dtype: torch.dtype, num_tokens: int, q_size: int, k_size: int, num_q: int, num_k: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    width = num_q * q_size + 2 * num_k * k_size
    qkv = torch.randn(num_tokens, width, generator=g) * torch.logspace(-2, 2, num_tokens)[:, None]
    weights = [1 + torch.randn(size, generator=g) * 0.2 for size in (q_size, k_size)]
    return [tensor.to(dtype) for tensor in (qkv, *weights)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_size", "k_size", "num_q", "num_k"), [(128, 128, 6, 2), (96, 32, 1, 1), (6, 6, 3, 1)])
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_agrees_with_the_reference(
    num_tokens: int, q_size: int, k_size: int, num_q: int, num_k: int, dtype: torch.dtype
) -> None:
    qkv, *weights = made(dtype, num_tokens, q_size, k_size, num_q, num_k)
    got, want = qkv.clone(), qkv.clone()
    qk_norm(got, *weights, num_q, num_k, 1e-6)
    qk_norm_ref(want, *weights, num_q, num_k, 1e-6)
    torch.testing.assert_close(got, want, atol=0, rtol=TOLERANCE[dtype])
    values = num_q * q_size + num_k * k_size
    assert torch.equal(got[:, values:], qkv[:, values:]) and not torch.equal(got[:, :values], qkv[:, :values])


def test_a_row_does_not_depend_on_the_others() -> None:
    qkv, *weights = made(torch.bfloat16, 40, 64, 64, 4, 2)
    together = qkv.clone()
    qk_norm(together, *weights, 4, 2, 1e-6)
    for row in (0, 13, 39):
        alone = qkv[row : row + 1].clone()
        qk_norm(alone, *weights, 4, 2, 1e-6)
        assert torch.equal(alone[0], together[row])


def test_no_tokens() -> None:
    qkv, *weights = made(torch.float32, 1, 8, 8, 2, 1)
    qk_norm(qkv[:0], *weights, 2, 1, 1e-6)
