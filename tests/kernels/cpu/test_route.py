"""Tests of the routing rules against published values and transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer as reference_sparsemixer

from moray.kernels.cpu.route import (
    sigmoid_one,
    sigmoid_one_ref,
    softmax_all,
    softmax_all_ref,
    softmax_topk,
    softmax_topk_ref,
    sparsemixer,
    sparsemixer_ref,
)


@pytest.mark.parametrize(
    ("logits", "weights", "ids"),
    [
        ([5.0, 5.0, 1.0, 1.0], [0.5, 1.0], [0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [0.25, 1 / 3], [0, 1]),
        ([1.0, 5.0, 3.0, 0.0], [1.0, 1.0], [1, 2]),
        ([1.0, 3.0, 3.0, 3.0], [1 / 3, 0.5], [1, 2]),
    ],
)
def test_sparsemixer_edges(logits: list[float], weights: list[float], ids: list[int]) -> None:
    got_weights, got_ids = sparsemixer(torch.tensor([logits]), jitter=0.01)
    assert got_ids.tolist() == [ids]
    torch.testing.assert_close(got_weights, torch.tensor([weights]))


def test_sparsemixer_weights_are_not_renormalised() -> None:
    weights, _ = sparsemixer(torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) * 3, jitter=0.01)
    assert (weights.sum(-1) > 1.9).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsemixer_equals_the_reference(dtype: torch.dtype) -> None:
    logits = (torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    near = torch.linspace(0.9, 1.0, 2001).to(dtype)  # one logit moves through the limit, 2% below the best
    logits[:2001, 0], logits[:2001, 1], logits[:2001, 2:] = 8.0, near * 8, -8.0
    weights, ids = sparsemixer(logits, jitter=0.01)
    want_weights, want_ids = reference_sparsemixer(logits, jitter_eps=0.01, training=False)
    assert torch.equal(ids, want_ids)
    # The weight jumps at the limit: in the model's dtype both must jump at the same logit.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(weights, want_weights.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [2, 5, 16, 128])
def test_the_rules_choose_as_torch_does(num_experts: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(5000, num_experts, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    logits[:1000] = logits[:1000].round()  # many ties
    for got, want in (
        (sparsemixer(logits, 0.01), sparsemixer_ref(logits, 0.01)),
        (softmax_topk(logits, 2), softmax_topk_ref(logits, 2)),
        (softmax_all(logits, min(8, num_experts)), softmax_all_ref(logits, min(8, num_experts))),
    ):
        assert torch.equal(got[1], want[1])
        # Ours adds up to 128 numbers one by one; how torch adds them depends on the CPU.
        torch.testing.assert_close(got[0], want[0], atol=2e-6, rtol=0)


def test_ties_go_to_the_lowest_index_everywhere() -> None:
    tied = torch.zeros(300, 8)
    for ids in (sparsemixer(tied, 0.01)[1], softmax_topk(tied, 2)[1], softmax_all(tied, 2)[1]):
        assert ids.tolist() == [[0, 1]] * 300


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_softmax_topk_is_softmax_over_all_renormalised(k: int) -> None:
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(2))
    weights, ids = softmax_topk(logits, k)
    best, want = logits.softmax(-1).topk(k)
    torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True))
    assert torch.equal(ids, want)


def test_softmax_all_is_not_renormalised() -> None:
    logits = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    weights, ids = softmax_all(logits, 8)
    want = logits.softmax(-1).topk(8)
    torch.testing.assert_close(weights, want[0])
    assert torch.equal(ids, want[1]) and (weights.sum(-1) < 0.9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_expert_is_weighted_by_the_sigmoid(dtype: torch.dtype) -> None:
    logits = torch.linspace(-30, 30, 601).to(dtype)[:, None]
    weights, ids = sigmoid_one(logits)
    want, want_ids = sigmoid_one_ref(logits)
    torch.testing.assert_close(weights, want, atol=0, rtol=1e-6)
    assert torch.equal(ids, want_ids) and not ids.any()


def test_no_tokens() -> None:
    none = torch.empty(0, 4)
    for weights, ids in (sparsemixer(none, 0.01), softmax_topk(none, 2), softmax_all(none, 2)):
        assert weights.shape == ids.shape == (0, 2)
    assert sigmoid_one(torch.empty(0, 1))[0].shape == (0, 1)


@pytest.mark.parametrize(
    "route", [lambda x: sparsemixer(x, 0.01), lambda x: softmax_topk(x, 2), lambda x: softmax_all(x, 5)]
)
def test_a_row_does_not_depend_on_the_others(route: object) -> None:
    logits = torch.randn(130, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    weights, ids = route(logits)  # type: ignore[operator]
    for row in range(0, 130, 7):
        alone_weights, alone_ids = route(logits[row : row + 1])  # type: ignore[operator]
        assert torch.equal(alone_weights[0], weights[row]) and torch.equal(alone_ids[0], ids[row])


def test_nan_logits_stay_visible() -> None:
    """A NaN must reach the logits, where the sampler reports it, and not be lost in the routing."""
    logits = torch.full((1, 4), torch.nan)
    weights: Tensor = sparsemixer(logits, 0.01)[0]
    assert weights.isnan().any()
