"""Tests that the device's random bits are the CPU's."""

import random

import torch
from triton_device import DEVICE

from moray.kernels.gpu.philox import uniform_bits, uniform_bits_ref

ENDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1]


def test_equals_the_cpu_bit_for_bit() -> None:
    rng = random.Random(0)
    rows = [(key, 0, 0) for key in (*ENDS, -1, -(2**63))]
    rows += [(7, 0, position) for position in ENDS] + [(7, sample, 3) for sample in (1, 2, 2**31 - 1)]
    rows += [(rng.getrandbits(64) - 2**63, rng.getrandbits(31), rng.getrandbits(40)) for _ in range(200)]
    keys, samples, positions = (torch.tensor(column, device=DEVICE) for column in zip(*rows, strict=True))
    samples = samples.int()
    bits = uniform_bits(keys, samples, positions)
    assert torch.equal(bits, uniform_bits_ref(keys, samples, positions))
    assert len(set(bits.tolist())) == len(set(rows))
