"""Tests of norms against their definitions in float64."""

import pytest
import torch

from moray.kernels.cpu.norms import (
    MIN_SHARED_ELEMENTS,
    add_layer_norm,
    add_layer_norm_ref,
    add_rms_norm,
    add_rms_norm_ref,
    layer_norm,
    rms_norm,
    rms_norm_ref,
)


@pytest.mark.parametrize("hidden", [1, 31, 80, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(hidden: int, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(7, hidden).to(dtype), torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    want_layer = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double() + b.double()
    want_rms = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5).double(), want_layer, **tolerance)
    torch.testing.assert_close(rms_norm(x, w, 1e-5).double(), want_rms, **tolerance)


def test_an_rms_norm_that_rounds_last_is_nearer() -> None:
    x, w = torch.randn(50, 1024).bfloat16(), torch.randn(1024).bfloat16()
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    last, first = ((rms_norm(x, w, 1e-5, rounds_last=last).double() - want).abs() for last in (True, False))
    assert (last <= want.abs() * 2**-8 + 1e-9).all(), "rounded once"
    assert last.mean() < 0.8 * first.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, w, b = torch.randn(130, 1024).to(dtype), torch.randn(1024).to(dtype), torch.randn(1024).to(dtype)
    layer, rms = layer_norm(x, w, b, 1e-5), rms_norm(x, w, 1e-5)
    for n in (1, 2, 15, 16, 17, 64):
        assert torch.equal(layer_norm(x[:n], w, b, 1e-5), layer[:n])
        assert torch.equal(rms_norm(x[:n], w, 1e-5), rms[:n])


@pytest.mark.parametrize("rounds_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 31, 2880])
def test_an_rms_norm_of_a_sum(hidden: int, dtype: torch.dtype, rounds_last: bool) -> None:
    """The sum has the reference's bits. Of its norm only the order in which squares are added up differs."""
    x, residual, w = torch.randn(40, hidden).to(dtype), torch.randn(40, hidden).to(dtype), torch.randn(hidden).to(dtype)
    ulp = torch.finfo(dtype).eps
    for multiplier in (1.0, 0.22):
        total, normed = add_rms_norm(x, residual, w, 1e-5, multiplier, rounds_last)
        exact, wanted = add_rms_norm_ref(x, residual, w, 1e-5, multiplier, rounds_last)
        assert torch.equal(total, exact)
        torch.testing.assert_close(normed, wanted, atol=0.0, rtol=8 * ulp)
        assert torch.equal(normed, rms_norm(total, w, 1e-5, rounds_last))
    torch.testing.assert_close(
        rms_norm(x, w, 1e-5, rounds_last), rms_norm_ref(x, w, 1e-5, rounds_last), atol=0.0, rtol=8 * ulp
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 31, 2560])
def test_a_layer_norm_of_a_sum(hidden: int, dtype: torch.dtype) -> None:
    """The sum has the reference's bits. Of its norm the order of sums and the rounding in between differ."""
    x, residual, w, b = (torch.randn(n, hidden).to(dtype) for n in (40, 40, 1, 1))
    w, b = w[0], b[0]
    for multiplier in (1.0, 0.22):
        total, normed = add_layer_norm(x, residual, w, b, 1e-5, multiplier)
        exact, wanted = add_layer_norm_ref(x, residual, w, b, 1e-5, multiplier)
        assert torch.equal(total, exact)
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(normed, wanted, atol=16 * ulp, rtol=8 * ulp)
        assert torch.equal(normed, layer_norm(total, w, b, 1e-5))


def test_a_layer_norm_of_a_large_mean() -> None:
    """The mean is subtracted before squares are added up: as much is left of small differences as fp32 can hold."""
    x = 1000.0 + torch.randn(20, 1024)
    want = torch.nn.functional.layer_norm(x.double(), (1024,)).float()
    got = layer_norm(x, torch.ones(1024), torch.zeros(1024), 1e-5)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_cores_share_many_rows() -> None:
    """A row is the same in a step that cores share, and in one that they do not; no rows are no work."""
    num_rows = 2 * MIN_SHARED_ELEMENTS // 256
    x, residual, w = torch.randn(num_rows, 256), torch.randn(num_rows, 256), torch.randn(256)
    shared = add_rms_norm(x, residual, w, 1e-5)
    alone = [add_rms_norm(x[n : n + 1], residual[n : n + 1], w, 1e-5) for n in range(num_rows)]
    for got, rows in zip(shared, zip(*alone, strict=True), strict=True):
        assert torch.equal(got, torch.cat(rows))
    assert [len(part) for part in add_rms_norm(x[:0], residual[:0], w, 1e-5)] == [0, 0]
