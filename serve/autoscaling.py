"""How many replicas: by the tokens still to compute or to generate. One request may be of one token or of thousands."""

import math
from collections.abc import Mapping
from typing import Any


def replicas_for(queued_tokens: float, tokens_per_replica: int) -> int:
    return max(1, math.ceil(queued_tokens / tokens_per_replica))


class ByQueuedTokens:
    """Serve's policy: called with an AutoscalingContext, whose bounds and delays Serve applies afterwards."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        by_replica: Mapping[Any, float] = (context.aggregated_metrics or {}).get("queued_tokens", {})
        return replicas_for(sum(by_replica.values()), self._tokens_per_replica), {}
