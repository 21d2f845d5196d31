"""Tests of the kernel that normalises queries and keys against the CPU's reference."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.cpu.qk_norm import qk_norm_ref
from moray.kernels.gpu.qk_norm import qk_norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def made(dtype: torch.dtype, q_size: int, k_size: int, num_q: int, num_k: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, num_q * q_size + 2 * num_k * k_size, generator=g) * torch.logspace(-2, 2, 5)[:, None]
    weights = [1 + torch.randn(size, generator=g) * 0.2 for size in (q_size, k_size)]
    return [tensor.to(DEVICE, dtype) for tensor in (qkv, *weights)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("q_size", "k_size", "num_q", "num_k"), [(128, 128, 6, 2), (96, 32, 1, 1), (6, 6, 3, 1)])
def test_agrees_with_the_reference(q_size: int, k_size: int, num_q: int, num_k: int, dtype: torch.dtype) -> None:
    qkv, *weights = made(dtype, q_size, k_size, num_q, num_k)
    got, want = qkv.clone(), qkv.clone()
    qk_norm(got, *weights, num_q, num_k, 1e-6)
    qk_norm_ref(want, *weights, num_q, num_k, 1e-6)
    torch.testing.assert_close(got, want, atol=0, rtol=TOLERANCE[dtype])
    values = num_q * q_size + num_k * k_size
    assert torch.equal(got[:, values:], qkv[:, values:])
    alone = qkv[2:3].clone()
    qk_norm(alone, *weights, num_q, num_k, 1e-6)
    assert torch.equal(alone[0], got[2])
