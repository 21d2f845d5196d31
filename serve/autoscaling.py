"""The autoscaling policy: it counts the tokens that are still to compute or to generate, not requests, of which one
may be of one token and another of thousands."""

import math
from collections.abc import Mapping
from typing import Any


def replicas_for(queued_tokens: float, tokens_per_replica: int) -> int:
    """Return how many replicas keep the queue of each at `tokens_per_replica` or below; at least one."""
    return max(1, math.ceil(queued_tokens / tokens_per_replica))


class ByQueuedTokens:
    """Chooses the number of replicas. Serve calls it with an AutoscalingContext and applies bounds and delays after."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        by_replica: Mapping[Any, float] = (context.aggregated_metrics or {}).get("queued_tokens", {})
        return replicas_for(sum(by_replica.values()), self._tokens_per_replica), {}
