"""StepInterrupter: interrupts a low-priority step between two layers when a request of a higher priority arrives.

On a CPU a full step takes a fifth of a second, a long time for a user who waits for a first token. The work of the
interrupted step is lost. Results stay the same, because a step is recorded only when it is complete.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

# The share of the time of low-priority steps, interrupted ones included, that interruptions may waste.
LOST_SHARE = 0.2
# Seconds: time that was not wasted is saved up as credit for later interruptions, up to this much.
MAX_CREDIT_S = 2.0


class StepInterrupted(Exception):
    """The step was interrupted and nothing of it was recorded; call schedule() again."""


class StepInterrupter:
    """Interrupts the steps of one model.

    layers:       modules that each step calls one after the other; a step can be interrupted before each of them
    call_in_step: see Backend.call_in_step
    """

    def __init__(self, layers: Iterable[nn.Module], call_in_step: Callable[[Callable[[], None]], None]) -> None:
        self._requested_priority: int | None = None  # priority of the urgent request; written by other threads
        self._step_priority: int | None = None  # lowest priority in the running step; None = do not interrupt
        self._credit_s = MAX_CREDIT_S
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: call_in_step(self._check))

    def request(self, priority: int) -> None:
        """Ask to interrupt the running step for a request of `priority`. May be called from any thread."""
        self._requested_priority = (
            priority if self._requested_priority is None else min(self._requested_priority, priority)
        )

    @contextmanager
    def step(self, lowest: int) -> Iterator[None]:
        """Run the body as a step whose lowest priority (highest number) is `lowest`.

        Raises StepInterrupted out of the body when the step is interrupted.
        """
        self._requested_priority = None
        self._step_priority = lowest if self._credit_s > 0 else None
        started = time.perf_counter()
        try:
            yield
        except StepInterrupted:
            self._credit_s -= (1 - LOST_SHARE) * (time.perf_counter() - started)
            raise
        finally:
            self._step_priority = None
        if lowest > 0:
            self._credit_s = min(MAX_CREDIT_S, self._credit_s + LOST_SHARE * (time.perf_counter() - started))

    def _check(self) -> None:
        if (
            self._requested_priority is not None
            and self._step_priority is not None
            and self._requested_priority < self._step_priority
        ):
            raise StepInterrupted
