"""Tests that quantized models on the Triton kernels give the CPU's tokens, whatever the batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_triton_engine import CONFIG, generate
from triton_backend import TRITON

import moray.engine.engine
from moray.engine.backends.cuda.quantized import PackedCodesFormat
from moray.engine.errors import DeviceError
from moray.engine.quantization.scheme import WEIGHT_KINDS, WeightKind
from moray.engine.quantization.weight import QuantizedWeight


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize(
    "architecture", ["phi-msft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "phimoe"))]
)
def test_tokens_equal_the_cpus(
    checkpoints: dict[str, Path], architecture: str, kind: WeightKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both multiply in fp32 by what the codes stand for."""
    _, want = generate(checkpoints[architecture], replace(CONFIG, device="cpu", quantization=kind))
    monkeypatch.setattr(moray.engine.engine, "choose_backend", lambda name: TRITON)
    ours, tokens = generate(checkpoints[architecture], replace(CONFIG, quantization=kind))
    assert tokens == want
    assert ours.runner.backend is TRITON


def quantized(n: int, k: int, group_size: int) -> QuantizedWeight:
    return QuantizedWeight("int8", torch.ones(n, k, dtype=torch.int8), torch.ones(n, -(-k // group_size)), group_size)


@pytest.mark.parametrize("pack", [PackedCodesFormat().pack_linear])
def test_groups_that_no_kernel_multiplies_are_refused(pack: Callable[..., object]) -> None:
    with pytest.raises(DeviceError, match=r"groups of 48 inputs; a GPU's kernels multiply groups of 32, 64 or mult"):
        pack(quantized(16, 96, 48), None)
