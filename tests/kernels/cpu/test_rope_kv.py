"""Tests of rope and cache write in one pass against separate torch operations."""

import pytest
import torch

from moray.kernels.cpu import rope_kv as module
from moray.kernels.cpu.paged_attention import new_key_cache, new_value_cache
from moray.kernels.cpu.rope_kv import rope_kv, rope_kv_ref
from moray.kernels.e4m3 import KvScales, to_e4m3


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_of_e4m3_agrees_with_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(11, (6 + 2 * 2) * 80, generator=g).to(dtype)
    qkv[3, -6:] = torch.tensor([torch.inf, -torch.inf, 1e30, 0.0, 2.0**-11, torch.nan])
    angles = torch.rand(11, 16, generator=g) * 6
    slots = torch.randperm(5 * 4, generator=g)[:11]
    scales = KvScales.of(torch.tensor([[0.01, 2.0], [0.3, 0.007]]))
    got, want = [], []
    for op, results in ((rope_kv, got), (rope_kv_ref, want)):
        caches = [new(5, 2, 4, 80, torch.float8_e4m3fn) for new in (new_key_cache, new_value_cache)]
        q = op(qkv, angles.cos(), angles.sin(), *caches, slots, 6, scales)
        results += [q, *(cache.view(torch.uint8) for cache in caches)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    last = got[2][slots[3] // 4, 1, slots[3] % 4, -6:].tolist()
    assert last[:4] == [0x7E, 0xFE, 0x7E, 0] and 0 < last[4] < 0x7E and last[5] & 0x7F == 0x7F


def test_every_number_is_rounded_to_the_nearest_code() -> None:
    """All numbers of bfloat16 as values."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 128)
    qkv = torch.cat((torch.zeros(len(every), 256, dtype=torch.bfloat16), every), 1)
    angles = torch.zeros(len(every), 64)
    caches = [new(32, 1, 16, 128, torch.float8_e4m3fn) for new in (new_key_cache, new_value_cache)]
    rope_kv(qkv, angles, angles, *caches, torch.arange(len(every)), 1, KvScales.of(torch.ones(2, 1)))
    stored = caches[1].view(-1, 128)
    is_number = ~every.isnan()
    assert torch.equal(stored.view(torch.uint8)[is_number], to_e4m3(every).view(torch.uint8)[is_number])
    assert stored.float()[~is_number].isnan().all() and not stored.float()[is_number].isnan().any()
