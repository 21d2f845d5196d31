"""GrammarCompiler compiles the grammars of requests beside the event loop, with limits on their number and time."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from moray.engine.async_engine import AsyncEngine
from moray.engine.errors import RequestError
from moray.engine.structured.checker import check_apart
from moray.engine.structured.constraint import Structured
from moray.serve.errors import ApiError

THREADS = 2
TIME_LIMIT_S = 30.0  # until one is compiled, on a machine that is busy with other work
NICENESS = 10  # of the threads: the engine's thread goes first where cores are short


class Constraint(NamedTuple):
    """Holds what a text must obey.

    param:  the field of the request that says it
    make:   makes it; raises RequestError for what is wrong at the first look
    parts:  makes what is checked before the whole, with the fields of the request that it comes from
    """

    param: str
    make: Callable[[], Structured]
    parts: Callable[[], Iterable[tuple[str, Structured]]] = tuple


class GrammarCompiler:
    """Compiles grammars in threads of its own, so that neither the event loop nor the engine waits for one.

    Each is checked in another process first, which is ended where it takes too long: what passes takes about as long to
    compile, and ends no process. One that the engine still has compiled does not wait for others.

    max_unfinished: grammars that may be compiled or wait for it
    """

    def __init__(self, engine: AsyncEngine, max_unfinished: int) -> None:
        self._engine = engine
        self._max_unfinished = max_unfinished
        self._num_unfinished = 0
        self._making = ThreadPoolExecutor(1, "making-grammars")
        self._compiling = ThreadPoolExecutor(THREADS, "compiling-grammars", initializer=_lower_priority)

    async def compile(self, constraint: Constraint, *, is_limited: bool = True) -> Structured:
        """Make a Structured, check it and compile it, so that the engine finds it compiled.

        is_limited: refuse it where many are unfinished, instead of waiting as long as it takes

        Raises ApiError: 400 for a grammar that is wrong or takes too long, 429 and 503 where others are in its way.
        """
        if is_limited and self._num_unfinished >= self._max_unfinished:
            message = f"{self._num_unfinished:,} grammars wait to be compiled, this endpoint's limit; try again"
            raise ApiError(429, "too_many_grammars", message, headers={"Retry-After": "1"})
        self._num_unfinished += 1
        try:
            structured = await asyncio.wrap_future(self._making.submit(constraint.make))
            if not self._engine.is_compiled(structured):
                future = self._compiling.submit(self._compile, structured, constraint)
                await (self._wait(future, constraint.param) if is_limited else asyncio.wrap_future(future))
            return structured
        except RequestError as error:
            param = constraint.param if error.field in (None, "structured") else error.field
            raise ApiError(400, error.code, f"{param}: {error.message}", param=param) from None
        finally:
            self._num_unfinished -= 1

    async def _wait(self, future: Future[None], param: str) -> None:
        compiled = asyncio.wrap_future(future)
        compiled.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody waits any more
        try:
            async with asyncio.timeout(TIME_LIMIT_S):
                await asyncio.shield(compiled)
        except TimeoutError:
            future.cancel()
            message = f"{param}: was not compiled within {TIME_LIMIT_S:g} s; try again, or make it simpler"
            raise ApiError(503, "unavailable", message, headers={"Retry-After": "5"}) from None
        except asyncio.CancelledError:
            future.cancel()
            raise

    def _compile(self, structured: Structured, constraint: Constraint) -> None:
        """Check and compile a grammar, in one of the threads."""
        for field, part in (*constraint.parts(), (constraint.param, structured)):
            try:
                check_apart(part)
            except RequestError as error:
                raise RequestError(error.code, error.message, field) from None
        self._engine.compile(structured)


def _lower_priority() -> None:
    """Lower the priority of the calling thread; on Linux each has its own."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
