"""Tests of the route kernel against the CPU's rules, on patterns that are difficult to sort."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.gpu import route as module
from moray.kernels.gpu.route import Routing, route, route_ref

DTYPES = [torch.float16, torch.bfloat16]


def made_logits(rows: int, num_experts: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE, dtype)


def all_to(expert: int, rows: int, num_experts: int) -> Tensor:
    logits = torch.zeros(rows, num_experts, dtype=torch.bfloat16, device=DEVICE)
    logits[:, expert] = 9
    return logits


def check(got: Routing, want: Routing) -> None:
    torch.testing.assert_close(got.topk_weights, want.topk_weights, atol=1e-6, rtol=1e-6)
    for name in ("topk_ids", "sorted_rows", "tile_experts", "expert_tiles"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.fixture(params=["one launch", "two launches"])
def num_launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two launches":
        monkeypatch.setattr(module, "MAX_PROGRAM_ELEMENTS", 0)
        monkeypatch.setattr(module, "PROGRAM_ELEMENTS", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 45])
def test_sparsemixer(rows: int, dtype: torch.dtype, num_launches: None) -> None:
    logits = made_logits(rows, 16, dtype)
    arguments = {"method": "sparsemixer", "top_k": 2, "jitter": 0.01, "block_m": 4}
    check(route(logits, **arguments), route_ref(logits, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 4), (6, 3), (8, 1), (8, 2)])
def test_softmax(num_experts: int, top_k: int, dtype: torch.dtype, num_launches: None) -> None:
    logits = made_logits(19, num_experts, dtype)
    arguments = {"method": "softmax", "top_k": top_k, "jitter": 0.0, "block_m": 16}
    check(route(logits, **arguments), route_ref(logits, **arguments))


@pytest.mark.parametrize("method", ["softmax", "softmax_all"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(60, 4), (128, 8)])
@pytest.mark.parametrize("max_counts", [0, 4096])
def test_many_experts(
    num_experts: int, top_k: int, method: str, max_counts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of the programs are added up by a launch of their own, or by each program that needs them."""
    monkeypatch.setattr(module, "MAX_COUNTS", max_counts)
    logits = made_logits(23, num_experts, torch.bfloat16)  # more than one launch has
    logits[3] = logits[3].round()
    arguments = {"method": method, "top_k": top_k, "jitter": 0.0, "block_m": 16}
    had = torch.zeros(num_experts, dtype=torch.int64, device=DEVICE)
    got = route(logits, tokens_per_expert=had, **arguments)
    check(got, route_ref(logits, **arguments))
    assert had.sum() == 23 * top_k
    for token in (0, 17):
        alone = route(logits[token : token + 1], **arguments)
        assert torch.equal(alone.topk_weights[0], got.topk_weights[token]), "one launch gives the bits of two"


def test_more_programs_than_a_launch_of_their_own_adds_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROGRAM_ELEMENTS", 0)
    monkeypatch.setattr(module, "PROGRAM_ELEMENTS", 4)
    monkeypatch.setattr(module, "MAX_COUNTS", 0)
    logits = made_logits(34, 4, torch.bfloat16)  # 34 programs of a token, in blocks of 32
    arguments = {"method": "softmax", "top_k": 1, "jitter": 0.0, "block_m": 4}
    check(route(logits, **arguments), route_ref(logits, **arguments))


@pytest.mark.parametrize("num_live", [None, 3])
def test_a_single_expert_is_weighted_by_the_sigmoid(num_live: int | None) -> None:
    logits = made_logits(9, 1, torch.bfloat16)
    count = None if num_live is None else torch.tensor([num_live], dtype=torch.int32, device=DEVICE)
    arguments = {"method": "sigmoid", "top_k": 1, "jitter": 0.0, "block_m": 4, "num_tokens": count}
    check(route(logits, **arguments), route_ref(logits, **arguments))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_edge_at_which_a_logit_drops_out(dtype: torch.dtype) -> None:
    logits = torch.full((201, 4), -8.0, dtype=dtype, device=DEVICE)
    logits[:, 0], logits[:, 1] = 8.0, torch.linspace(0.97, 0.99, 201).to(DEVICE, dtype) * 8
    arguments = {"method": "sparsemixer", "top_k": 2, "jitter": 0.01, "block_m": 16}
    got = route(logits, **arguments)
    assert got.topk_weights[0, 0] == 1.0 and got.topk_weights[-1, 0] < 0.6
    check(got, route_ref(logits, **arguments))


@pytest.mark.parametrize(("dtype", "best", "second"), [(torch.bfloat16, 249.0, 244.0), (torch.float16, 1749.0, 1714.0)])
def test_the_gap_is_rounded_before_it_is_compared(dtype: torch.dtype, best: float, second: float) -> None:
    """The logits are just above 2% apart, and 2% apart in their dtype, so the second one is kept."""
    assert (best - second) / best > float(torch.tensor(0.02, dtype=dtype))
    logits = torch.tensor([[best, second, 0.0, 0.0]]).to(DEVICE, dtype) / 256
    arguments = {"method": "sparsemixer", "top_k": 2, "jitter": 0.01, "block_m": 16}
    got = route(logits, **arguments)
    assert got.topk_weights[0, 0] < 1.0
    check(got, route_ref(logits, **arguments))


@pytest.mark.parametrize("method", ["sparsemixer", "softmax"])
def test_ties_go_to_the_lowest_index(method: str) -> None:
    logits = torch.zeros(5, 8, dtype=torch.bfloat16, device=DEVICE)
    got = route(logits, method=method, top_k=2, jitter=0.01, block_m=16)
    assert got.topk_ids.tolist() == [[0, 1]] * 5


def test_all_to_one_expert_leaves_the_others_empty(num_launches: None) -> None:
    logits = all_to(5, rows=21, num_experts=8)
    arguments = {"method": "softmax", "top_k": 1, "jitter": 0.0, "block_m": 4}
    got = route(logits, **arguments)
    check(got, route_ref(logits, **arguments))
    assert got.tile_experts.tolist()[:6] == [5] * 6


@pytest.mark.parametrize("num_live", [0, 31])
def test_tokens_are_added_to_what_the_experts_had(num_live: int, num_launches: None) -> None:
    logits = made_logits(45, 6, torch.bfloat16)
    count = torch.tensor([num_live], dtype=torch.int32, device=DEVICE)
    had = torch.arange(6, device=DEVICE) * 10**10
    arguments = {"method": "softmax", "top_k": 3, "jitter": 0.0, "block_m": 4}
    ours, want = had.clone(), had.clone()
    for padded in ({"num_tokens": count}, {}):
        check(
            route(logits, tokens_per_expert=ours, **arguments, **padded),
            route_ref(logits, tokens_per_expert=want, **arguments, **padded),
        )
        assert torch.equal(ours, want)
    assert (ours - had).sum() == 3 * (45 + num_live)


@pytest.mark.parametrize("num_live", [0, 1, 6, 13])
def test_padding_tokens_go_to_no_expert(num_live: int, num_launches: None) -> None:
    logits = made_logits(13, 4, torch.bfloat16)
    logits[num_live:] = torch.nan
    count = torch.tensor([num_live], dtype=torch.int32, device=DEVICE)
    arguments = {"method": "sparsemixer", "top_k": 2, "jitter": 0.01, "block_m": 4, "num_tokens": count}
    got = route(logits, **arguments)
    check(got, route_ref(logits, **arguments))
    assert (got.topk_ids[num_live:] == -1).all() and (got.topk_weights[num_live:] == 0).all()
    assert sorted(row for row in got.sorted_rows.tolist() if row < 26) == list(range(26))


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
def test_the_worst_case_fits(rows: int) -> None:
    """One assignment to each expert needs the most tiles."""
    ids = torch.arange(rows, device=DEVICE) % 8
    logits = torch.nn.functional.one_hot(ids, 8).to(torch.bfloat16)
    count = torch.tensor([rows - 1], dtype=torch.int32, device=DEVICE)
    arguments = {"method": "softmax", "top_k": 1, "jitter": 0.0, "block_m": 16, "num_tokens": count}
    check(route(logits, **arguments), route_ref(logits, **arguments))


def test_a_token_s_weights_do_not_depend_on_the_others(num_launches: None) -> None:
    logits = made_logits(40, 16, torch.bfloat16)
    arguments = {"method": "sparsemixer", "top_k": 2, "jitter": 0.01, "block_m": 16}
    together = route(logits, **arguments)
    for token in (0, 7, 39):
        alone = route(logits[token : token + 1], **arguments)
        assert torch.equal(alone.topk_weights[0], together.topk_weights[token])
        assert torch.equal(alone.topk_ids[0], together.topk_ids[token])
