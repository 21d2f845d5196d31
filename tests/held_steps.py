"""HeldSteps: lets a test decide when an engine's steps run, so that it can wait for states instead of times."""

import time
from collections.abc import Callable
from threading import Event, Semaphore
from types import TracebackType
from typing import Any, Self

from patience import PATIENCE_S


class HeldSteps:
    """A context in which each step of an engine waits until the test allows it; leaving it lets all steps run."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._step = engine.step
        self._begun, self._allowed, self._is_open = Semaphore(0), Semaphore(0), Event()

    def __enter__(self) -> Self:
        self._engine.step = self._wait_and_step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.open()
        self._engine.step = self._step

    def _wait_and_step(self) -> Any:
        self._begun.release()
        if not self._is_open.is_set():
            assert self._allowed.acquire(timeout=PATIENCE_S), "the test did not allow this step"
        return self._step()

    def wait_until_held(self) -> None:
        """Wait until the next step is held."""
        assert self._begun.acquire(timeout=PATIENCE_S), "no step began"

    def allow(self) -> None:
        """Let the held step run."""
        self._allowed.release()

    def run(self, steps: int = 1) -> None:
        """Let `steps` steps run, and wait until the one after them is held. The first of them must be held already."""
        for _ in range(steps):
            self.allow()
            self.wait_until_held()

    def open(self) -> None:
        """Let the held step and all further ones run."""
        self._is_open.set()
        self._allowed.release()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.002)
