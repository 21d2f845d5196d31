import math
from dataclasses import replace

import pytest
from repository import CONFIGS

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.core.token_cost import MAX_COST, TokenCost, token_cost


def test_the_cost_grows_with_the_keys_in_the_window() -> None:
    cost = TokenCost(even_keys=100, window=50)
    assert [cost.at(position) for position in (0, 25, 50, 10**6)] == [1, 1.25, 1.5, 1.5]
    assert TokenCost(even_keys=100).at(10**6) == MAX_COST


def test_the_total_is_that_of_the_tokens() -> None:
    for cost in (TokenCost(math.inf), TokenCost(20), TokenCost(20, window=70)):
        for start, stop in ((0, 1), (0, 60), (30, 65), (30, 400), (200, 300)):
            tokens = sum(cost.at(position) for position in range(start, stop))
            assert cost.total(start, stop) == pytest.approx(tokens, rel=0.03)
            assert cost.total(start, stop) > cost.total(start + 1, stop)


def test_the_cost_follows_from_the_shape_of_a_layer() -> None:
    """Phi-3.5-MoE: a layer has 199 M multiplications for a token, and 8,192 more for each key."""
    cost = token_cost(read_model_config(CONFIGS / "phi-3.5-moe"))
    assert cost.even_keys == (2 * 4096 * (4096 + 1024) + 2 * 3 * 4096 * 6400) / (2 * 4096)
    assert 6 < cost.at(131_071) < 7


def test_layers_without_a_window_count_for_their_share() -> None:
    """Every other layer of gpt-oss attends to all keys."""
    model = read_model_config(CONFIGS / "gpt-oss-20b")
    cost = token_cost(model)
    every = token_cost(replace(model, full_layers=(), sliding_window=None))
    assert cost.window is None and cost.even_keys == 2 * every.even_keys
