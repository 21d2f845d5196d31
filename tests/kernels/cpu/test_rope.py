"""Tests of rotary embedding against its definition."""

import math

import pytest
import torch

from moray.kernels.cpu.rope import rotate


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (20, 8), (80, 32)])
def test_pairs_half_a_rotary_dim_apart_turn_together(head_dim: int, rotary_dim: int) -> None:
    x = torch.randn(3, 2, head_dim, dtype=torch.float64).float()
    angles = torch.rand(3, rotary_dim // 2) * 6
    got = rotate(x, angles.cos(), angles.sin())
    half = rotary_dim // 2
    for t in range(3):
        for i in range(half):
            turn = complex(math.cos(angles[t, i]), math.sin(angles[t, i]))
            for h in range(2):
                pair = complex(x[t, h, i], x[t, h, i + half]) * turn
                assert got[t, h, i].item() == pytest.approx(pair.real, abs=1e-5)
                assert got[t, h, i + half].item() == pytest.approx(pair.imag, abs=1e-5)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


def test_bf16_is_rounded_once() -> None:
    x = torch.randn(50, 4, 16).bfloat16()
    angles = torch.rand(50, 8) * 100
    exact = rotate(x.double().float(), angles.cos(), angles.sin())
    assert torch.equal(rotate(x, angles.cos(), angles.sin()), exact.bfloat16())
