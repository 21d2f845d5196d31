from collections.abc import Iterator

import pytest
import torch

from moray.kernels.cpu import best_tokens as module
from moray.kernels.cpu.best_tokens import NO_TOKEN, best_tokens, best_tokens_ref

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=(1, 2, 5), autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MIN_SHARED_ELEMENTS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 17), (64, 1000), (0, 5)):
        for scale in (1.0, 1e-3):  # the small scale has many ties
            logits = (torch.randn(shape, generator=generator) * 100 * scale).round().mul(scale).to(dtype)
            assert torch.equal(best_tokens(logits), best_tokens_ref(logits))
            assert torch.equal(best_tokens(logits - 1000), best_tokens_ref(logits - 1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    cases = [
        ((-1.0, -0.0, 0.0, -2.0), 1),
        ((-1.0, 0.0, -0.0, -2.0), 1),
        ((-inf, -3.0, -inf, -3.0), 1),
        ((1.0, inf, 2.0, 3.0), NO_TOKEN),
        ((-inf, -inf, -inf, -inf), NO_TOKEN),
        ((1.0, 2.0, nan, 3.0), NO_TOKEN),
        ((1.0, 2.0, -nan, 3.0), NO_TOKEN),
    ]
    logits = torch.tensor([row for row, _ in cases], dtype=dtype)
    assert best_tokens(logits).tolist() == [token for _, token in cases]
