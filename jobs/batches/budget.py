"""RowBudget: how many lines are with the replicas at a time, over all batches."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class RowBudget:
    """Admits shards of lines in the order in which they ask, so batches that run at the same time take turns.

    A shard is admitted while fewer than `target` lines are in flight, so the engines stay full and their queues short.

    target:  lines that should be in flight
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._in_flight: float = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()

    @property
    def target(self) -> int:
        return self._target

    @target.setter
    def target(self, value: int) -> None:
        self._target = value
        self._changed.set()

    @property
    def in_flight(self) -> float:
        return self._in_flight

    async def acquire(self, rows: float) -> Callable[[], None]:
        """Wait until `rows` more lines may be in flight; for infinitely many until nothing else is.

        Returns what gives them back; calling it again does nothing.
        """
        async with self._turn:
            while self._in_flight > 0 and (rows == math.inf or self._in_flight >= self._target):
                self._changed.clear()
                await self._changed.wait()
            self._in_flight += rows
        is_held = True

        def release() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._in_flight = 0 if rows == math.inf else self._in_flight - rows
                self._changed.set()

        return release

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Have nothing else in flight in the context."""
        release = await self.acquire(math.inf)
        try:
            yield
        finally:
            release()
