import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.cpu.sampling import SCALE, penalize, sample, top_tokens


def slow_kept(logits, temperature, top_k, top_p, min_p):
    """Return the weights of the tokens that the filters keep, computed token by token."""
    scores = (logits - logits.max()) / torch.tensor(temperature)
    weights = (scores.exp() * SCALE).long().tolist()
    ranking = sorted(range(len(weights)), key=lambda token: (-scores[token].item(), token))
    if top_k > 0:
        ranking = ranking[:top_k]
    if top_p < 1:
        limit = max(1, math.ceil(float(sum(weights[token] for token in ranking)) * top_p))
        kept, mass = [], 0
        for token in ranking:
            if mass < limit:
                kept.append(token)
            mass += weights[token]
        ranking = kept
    return {token: weights[token] for token in ranking if weights[token] >= min_p * SCALE}


def slow_sample(logits, temperature, top_k, top_p, min_p, bits):
    kept = slow_kept(logits, temperature, top_k, top_p, min_p)
    target = sum(kept.values()) * bits >> 64
    for token in sorted(kept):
        target -= kept[token]
        if target < 0:
            return token
    raise AssertionError("no token")


def draw(logits, params, bits):
    """Sample tokens. params: (temperature, top_k, top_p, min_p) per row"""
    temperature, top_k, top_p, min_p = zip(*params, strict=True)
    return sample(
        logits,
        torch.tensor(temperature, dtype=torch.float32),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
        bits,
    ).tolist()


PARAMS = st.tuples(
    st.sampled_from([1e-6, 0.1, 0.7, 1.0, 3.0, 10.0]),
    st.sampled_from([0, 1, 2, 10, 63, 64, 65, 500]),
    st.sampled_from([1.0, 0.999999, 0.9, 0.5, 0.1, 1e-300]),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)


@given(
    vocab_size=st.sampled_from([1, 2, 5, 64, 65, 100, 700]),
    params=st.lists(PARAMS, min_size=1, max_size=20),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    num_levels=st.sampled_from([1, 8, None]),
    num_impossible=st.integers(0, 64),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_draws_what_the_slow_way_draws(vocab_size, params, spread, num_levels, num_impossible, seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    logits = torch.randn(len(params), vocab_size) * spread
    if num_levels is not None:  # ties
        logits = (logits * num_levels).round() / num_levels
    logits[:, torch.randperm(vocab_size)[: min(num_impossible, vocab_size - 1)]] = -torch.inf
    bits = [rng.choice([0, 2**64 - 1, rng.getrandbits(64)]) for _ in params]
    expected = [slow_sample(row, *row_params, b) for row, row_params, b in zip(logits, params, bits, strict=True)]
    assert draw(logits, params, bits) == expected


def test_samples_follow_the_filtered_distribution():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.0, -3.0, 0.0, 1.9])
    params = (0.8, 6, 0.93, 0.1)
    weights = slow_kept(logits, *params)
    assert 2 < len(weights) < 6  # every filter has cut something
    num_draws = 8_000
    rng = random.Random(0)
    drawn = draw(logits.expand(num_draws, -1), [params] * num_draws, [rng.getrandbits(64) for _ in range(num_draws)])
    counts = {token: drawn.count(token) for token in weights}
    assert sum(counts.values()) == num_draws
    total = sum(weights.values())
    expected = {token: num_draws * weight / total for token, weight in weights.items()}
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in weights)
    assert chi_square < 18.5  # the 0.999 quantile for 4 degrees of freedom, more than there are


def test_weights_are_the_softmax():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3
    weights = slow_kept(logits, 0.7, 0, 1.0, 0.0)
    shares = torch.tensor([weights.get(token, 0) for token in range(300)], dtype=torch.float64)
    torch.testing.assert_close(shares / shares.sum(), (logits.double() / 0.7).softmax(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ((1.0, 3, 1.0, 0.0), {1, 2, 3}),  # of four equals the lowest ids
        ((1.0, 99, 1.0, 0.0), {0, 1, 2, 3, 4, 5}),  # top_k beyond the vocabulary
        ((1.0, 0, 1e-9, 0.0), {1}),  # top_p always keeps one
        ((1.0, 0, 0.25, 0.0), {1, 2}),  # 0.24 of the mass is in each of the four
        ((1.0, 0, 1.0, 1.0), {1, 2, 3, 4}),  # min_p 1 keeps the best ones
        ((1.0, 2, 0.5, 0.0), {1}),  # top_p is a share of what top_k kept
        ((1e-6, 0, 1.0, 0.0), {1, 2, 3, 4}),
    ],
)
def test_filters(params, kept):
    logits = torch.tensor([-2.0, 1.0, 1.0, 1.0, 1.0, -2.0])
    bits = [i << 55 for i in range(512)]  # all of [0, 1), evenly
    assert set(draw(logits.expand(len(bits), -1), [params] * len(bits), bits)) == kept


def test_a_large_vocabulary_of_equals_is_cut_by_id():
    logits = torch.zeros(2, 51200)
    ends = [2**64 - 1] * 2
    assert draw(logits, [(1.0, 0, 0.5, 0.0), (1.0, 1000, 1.0, 0.0)], ends) == [25599, 999]


def test_all_tokens_but_one_impossible():
    logits = torch.full((3, 51200), -torch.inf)
    logits[:, 40_000] = -5.0
    params = [(1.0, 0, 1.0, 0.0), (1.0, 50, 0.9, 0.1), (2.0, 0, 0.9, 0.0)]
    assert draw(logits, params, [0, 2**63, 2**64 - 1]) == [40_000] * 3


def test_penalties():
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0], [2.0, -2.0, 0.0, 1.0]])
    expected = logits.clone()
    expected[0, 0] = 2.0 / 2.0 - 3 * 0.25 - 0.5  # generated three times
    expected[0, 1] = -2.0 * 2.0  # in the prompt alone
    expected[1, 3] = 1.0 - 1.5
    penalize(
        logits,
        rows=torch.tensor([0, 0, 1]),
        token_ids=torch.tensor([0, 1, 3]),
        counts=torch.tensor([3.0, 0.0, 1.0]),
        repetition=torch.tensor([2.0, 1.0]),
        presence=torch.tensor([0.5, 1.5]),
        frequency=torch.tensor([0.25, 0.0]),
    )
    assert torch.equal(logits, expected)


@given(
    vocab_size=st.sampled_from([1, 3, 17, 40, 200]),
    k=st.integers(0, 20),
    num_levels=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_top_tokens_are_the_best_with_the_lowest_ids(vocab_size, k, num_levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, num_levels, (4, vocab_size), generator=generator).float()
    values, ids = top_tokens(scores, k)
    for row, row_values, row_ids in zip(scores.tolist(), values.tolist(), ids.tolist(), strict=True):
        best = sorted(range(vocab_size), key=lambda token: (-row[token], token))[:k]
        assert row_ids == best
        assert row_values == [row[token] for token in best]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [3, 17, 32064, 51200])
def test_max_gives_the_first_of_equals_and_shows_nan(dtype, vocab_size):
    # Greedy sampling relies on this.
    logits = torch.randint(0, 3, (5, vocab_size), generator=torch.Generator().manual_seed(0)).to(dtype)
    first = [row.index(max(row)) for row in logits.tolist()]
    assert logits.max(1).indices.tolist() == first
    logits[2, 1] = torch.nan
    assert logits.max(1).values.isnan().tolist() == [False, False, True, False, False]
