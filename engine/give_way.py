"""GiveWay: a step with requests of a lower priority in it is given up, between two layers, for one that comes.

On a CPU a full step takes a fifth of a second: long, for somebody who waits for a first token. What the step has
computed is lost; the answers are the same, since nothing of it was recorded.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Of the time that such steps take, lost ones included. What was not lost lately may be lost later, up to so much.
LOST_SHARE = 0.2
MAX_CREDIT_S = 2.0


class StepGivenUp(Exception):
    """Nothing of the step counts; schedule again."""


class GiveWay:
    """Watches over the steps of one model.

    layers: modules that each step calls in turn
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._asked: int | None = None  # written by other threads; the priority of who came
        self._lowest: int | None = None  # of the step that runs, while it may be given up
        self._credit_s = MAX_CREDIT_S
        for layer in layers:
            layer.register_forward_pre_hook(self._check)

    def ask(self, priority: int) -> None:
        """A request of this priority waits. From any thread."""
        self._asked = priority if self._asked is None else min(self._asked, priority)

    @contextmanager
    def step(self, lowest: int) -> Iterator[None]:
        """A step whose lowest priority (the highest number) is `lowest`. Raises StepGivenUp out of it."""
        self._asked = None
        self._lowest = lowest if self._credit_s > 0 else None
        started = time.perf_counter()
        try:
            yield
        except StepGivenUp:
            self._credit_s -= (1 - LOST_SHARE) * (time.perf_counter() - started)
            raise
        finally:
            self._lowest = None
        if lowest > 0:
            self._credit_s = min(MAX_CREDIT_S, self._credit_s + LOST_SHARE * (time.perf_counter() - started))

    def _check(self, *_: Any) -> None:
        if self._asked is not None and self._lowest is not None and self._asked < self._lowest:
            raise StepGivenUp
