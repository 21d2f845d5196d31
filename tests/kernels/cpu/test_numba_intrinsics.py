"""Tests of the arithmetic of compiled kernels, number by number."""

from typing import Any

import pytest
import torch

from moray.kernels.cpu.numba_intrinsics import array, compiled, exp, narrow, widen


@compiled
def round_each(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = narrow(x[i], out[i])


@compiled
def widen_each(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = widen(x[i])


@compiled
def exp_each(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = exp(x[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_and_widened_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0x3F800000, 0x3F800000 + 2**18, 2**12, dtype=torch.int32)
    x = torch.cat((bits, ties)).view(torch.float32)
    narrowed, widened = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    round_each(array(x), array(narrowed))
    torch.testing.assert_close(narrowed, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    widen_each(array(narrowed), array(widened))
    torch.testing.assert_close(widened, narrowed.float(), rtol=0, atol=0, equal_nan=True)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = torch.cat((-torch.logspace(-20, 1.93, 100_000), torch.tensor([0.0, -87.0])))
    out, want = torch.empty_like(x), x.double().exp()
    exp_each(array(x), array(out))
    assert ((out.double() - want) / want).abs().max() < 2 * 2.0**-23
    assert out[-2] == 1


def test_exp_of_what_is_no_number_and_of_the_smallest() -> None:
    x, out = torch.tensor([torch.nan, -1e30, -torch.inf]), torch.empty(3)
    exp_each(array(x), array(out))
    assert out[0].isnan() and (out[1:] < 1e-37).all()


def test_memory_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(AssertionError, match="strides"):
        array(torch.zeros(2, 3).T)
