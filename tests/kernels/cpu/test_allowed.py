import pytest
import torch

from moray.kernels.cpu.allowed import keep_allowed, keep_allowed_ref


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
def test_agrees_with_torch(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator)
    num_words = -(-vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (4, num_words), generator=generator).int()
    masks[1], masks[2] = -1, 0
    rows = torch.tensor([5, 0, 3, 2], dtype=torch.int32)
    expected = logits.clone()
    keep_allowed_ref(expected, masks, rows)
    untouched = logits[[0, 1, 4]].clone()
    keep_allowed(logits, masks, rows)
    assert torch.equal(logits, expected)
    assert torch.equal(logits[[0, 1, 4]], untouched)
    assert bool(logits[3].isinf().all())


def test_a_token_is_a_bit() -> None:
    logits = torch.zeros(1, 70)
    masks = torch.tensor([[1 << 5, -(2**31), 1 << 3]], dtype=torch.int32)
    keep_allowed(logits, masks, torch.zeros(1, dtype=torch.int32))
    assert logits.isfinite().nonzero()[:, 1].tolist() == [5, 63, 67]
