"""Tests of the kernel of logprobs against its reference, and of what must not depend on other rows."""

import math

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.gpu import token_logprobs as module
from moray.kernels.gpu.token_logprobs import token_logprobs, token_logprobs_ref


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a row take several blocks."""
    monkeypatch.setattr(module, "MAX_BLOCK", 64)


def inputs(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 5).to(DEVICE, dtype)
    return logits, torch.randint(vocab_size, (num_rows,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (5, 20), (64, 3), (193, 20), (300, 0)])
def test_equals_the_reference(vocab_size: int, k: int, dtype: torch.dtype) -> None:
    logits, token_ids = inputs(3, vocab_size, dtype)
    logprobs, best_ids = token_logprobs(logits, token_ids, k)
    wanted, wanted_ids = token_logprobs_ref(logits, token_ids, k)
    assert best_ids.tolist() == wanted_ids.tolist()
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=1e-5)


def test_equals_are_in_order_of_their_ids() -> None:
    """Among equals are the best tokens, some in other blocks, and those without any weight."""
    logits = torch.full((1, 200), -math.inf)
    logits[0, [190, 3, 70, 71]] = 2.0
    logits[0, [189, 5]] = 2.0 - 1e-7  # another logit, perhaps the same logprob
    _, best_ids = token_logprobs(logits.to(DEVICE), torch.tensor([3], device=DEVICE), 9)
    assert best_ids.tolist() == [[3, 70, 71, 190, 5, 189, 0, 1, 2]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_has_no_logprobs_and_leaves_the_others_alone(bad: float) -> None:
    logits, token_ids = inputs(3, 150)
    wanted = token_logprobs(logits, token_ids, 4)
    logits[1, 80] = bad
    logprobs, best_ids = token_logprobs(logits, token_ids, 4)
    assert logprobs[1, 0].isnan()
    assert (best_ids[1] < 150).all() and (best_ids[1] >= 0).all()
    for found, expected in zip((logprobs, best_ids), wanted, strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_bits_depend_neither_on_other_rows_nor_on_k() -> None:
    logits, token_ids = inputs(5, 193, torch.bfloat16)
    together, ids = token_logprobs(logits, token_ids, 7)
    for row in range(5):
        alone, id_alone = token_logprobs(logits[row : row + 1], token_ids[row : row + 1], 2)
        assert torch.equal(alone[0], together[row, :3]) and torch.equal(id_alone[0], ids[row, :2])
