"""TokenCost: how much longer a step takes for a prompt token with many keys before it. Pure."""

from dataclasses import dataclass

from moray.engine.config import ModelConfig

MAX_COST = 8.0  # so that a chunk of a very long prompt is still large enough to share one read of the experts


@dataclass(frozen=True)
class TokenCost:
    """States what a prompt token costs a step, as a multiple of the first token's cost.

    even_keys:  keys whose attention takes as many multiplications as all else that the model computes for a token
    window:     keys that a token attends to at most; None = all
    """

    even_keys: float
    window: int | None = None

    def at(self, position: int) -> float:
        """Return the cost of the token at a position: 1 for the first one, and at most MAX_COST."""
        keys = position if self.window is None else min(position, self.window)
        return min(MAX_COST, 1 + keys / self.even_keys)

    def total(self, start: int, stop: int) -> float:
        """Return the cost of the tokens from `start` to `stop` - 1. It shrinks as `start` grows."""
        limit = (MAX_COST - 1) * self.even_keys  # from here on the cost stays
        limit = limit if self.window is None else min(limit, self.window)
        first, last = min(start, limit), min(stop, limit)
        rising = (last - first) * (1 + (first + last) / 2 / self.even_keys)
        return rising if stop <= limit else rising + (stop - max(start, limit)) * self.at(stop)


def token_cost(model: ModelConfig) -> TokenCost:
    """Return the cost of a model's tokens, from the multiplications of a layer. An expert counts as three matrices.

    Where some layers have a window and others not, the keys in windows are so few that they are not counted.
    """
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * q + 2 * kv)
    experts = model.num_experts_per_tok * 3 * model.hidden_size * model.intermediate_size
    even_keys = (attention + experts) / (2 * q)
    if model.full_layers:
        return TokenCost(even_keys * model.num_layers / len(model.full_layers))
    return TokenCost(even_keys, model.sliding_window)
