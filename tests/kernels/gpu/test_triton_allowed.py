"""Tests of the kernel that forbids tokens against its reference and the CPU's."""

import pytest
import torch
from triton_device import DEVICE

from moray.kernels.cpu import allowed as cpu_allowed
from moray.kernels.gpu import allowed
from moray.kernels.gpu.allowed import keep_allowed, keep_allowed_ref


@pytest.mark.parametrize("vocab_size", [1, 31, 64, 100, 1003])
def test_it_forbids_what_the_reference_and_the_cpu_forbid(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed, "BLOCK", 64)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator)
    masks = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), generator=generator).int()
    masks[1] = -1
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    expected, of_cpu, ours = logits.clone(), logits.clone(), logits.to(DEVICE)
    keep_allowed_ref(expected, masks, rows)
    cpu_allowed.keep_allowed(of_cpu, masks, rows)
    keep_allowed(ours, masks.to(DEVICE), rows.to(DEVICE))
    assert torch.equal(ours.cpu(), expected) and torch.equal(of_cpu, expected)
    assert torch.equal(ours.cpu()[[0, 1, 3]], logits[[0, 1, 3]])


def test_no_masks_are_no_work() -> None:
    logits = torch.ones(2, 5, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    keep_allowed(logits, none.reshape(0, 1), none)
    assert torch.equal(logits.cpu(), torch.ones(2, 5))
