"""Tests of rope and cache write in one pass against separate torch operations."""

import pytest
import torch

from moray.kernels.cpu import rope_kv as module
from moray.kernels.cpu.paged_attention import new_key_cache, new_value_cache
from moray.kernels.cpu.rope_kv import rope_kv, rope_kv_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 32), (6, 2)])
@pytest.mark.parametrize("few_numbers", [0, 2**18])
def test_agrees_with_the_reference_bit_by_bit(
    head_dim: int, rotary_dim: int, dtype: torch.dtype, few_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_SHARED_ELEMENTS", few_numbers)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(11, (6 + 2 * 2) * head_dim, generator=g).to(dtype)
    qkv[3, :3] = torch.tensor([torch.inf, -torch.inf, 1e-30])
    angles = torch.rand(11, rotary_dim // 2, generator=g) * 6
    slots = torch.randperm(5 * 4, generator=g)[:11]
    got, want = [], []
    for op, results in ((rope_kv, got), (rope_kv_ref, want)):
        caches = [new(5, 2, 4, head_dim, dtype) for new in (new_key_cache, new_value_cache)]
        results += [op(qkv, angles.cos(), angles.sin(), *caches, slots, 6), *caches]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
