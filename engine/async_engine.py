"""AsyncEngine: an asyncio interface to an Engine that steps in its own thread. The endpoint uses it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVarTuple

from moray.engine.config import ModelConfig
from moray.engine.core.limits import Limits
from moray.engine.engine_loop import EngineLoop
from moray.engine.errors import EngineError, RequestError
from moray.engine.metrics import EngineStats
from moray.engine.request import Output, Request
from moray.engine.structured.constraint import Structured

if TYPE_CHECKING:
    from moray.engine.engine import Engine
    from moray.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")


class OutputStream:
    """Yields the outputs of some requests, as an async iterator of lists of the Outputs since the previous list.

    A stream is a context manager; leaving it aborts its unfinished requests. Iterating raises RequestError when the
    engine rejects one of the requests, and EngineError when the engine fails.
    """

    def __init__(self, engine: "AsyncEngine", requests: Sequence[Request]) -> None:
        self.requests = {request.request_id: request for request in requests}
        # request_id -> sample -> tokens still to compute or to generate; finished samples are removed
        self.remaining = {
            request.request_id: dict.fromkeys(
                range(request.num_samples), len(request.prompt_token_ids) + request.params.max_tokens
            )
            for request in requests
        }
        self._engine = engine
        self._outputs: list[Output] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Abort the unfinished requests."""
        self._engine._abort_stream(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Output]:
        while not self._outputs:
            if self._failure is not None:
                raise self._failure
            if not self.remaining:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _append(self, output: Output) -> None:
        """Append an output and wake the reader. Call it in the event loop, like _fail."""
        self._outputs.append(output)
        remaining, max_tokens = self.remaining[output.request_id], self.requests[output.request_id].params.max_tokens
        remaining[output.sample] = min(remaining[output.sample], max_tokens) - len(output.new_token_ids)
        if output.completion is not None:
            del remaining[output.sample]
            if not remaining:
                del self.remaining[output.request_id]
        self._wake()

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Runs requests on an Engine in its own thread. All methods must be called in one event loop.

    The outputs of a step come back in one call into the event loop. An exception in the engine fails every stream, also
    those submitted later, and is kept in `failure`.
    """

    def __init__(self, make_engine: "Callable[[], Engine]", event_loop: asyncio.AbstractEventLoop) -> None:
        """Prepare the thread without starting it; call start() instead."""
        self.failure: EngineError | None = None
        self._event_loop = event_loop
        self._streams: dict[str, OutputStream] = {}  # request_id -> the stream it belongs to
        self._is_draining = False
        self._idle: asyncio.Future[None] | None = None
        self._engine_loop = EngineLoop(
            make_engine,
            after_step=self._return_outputs,
            on_rejection=self._return_rejection,
            on_failure=self._return_failure,
        )

    @classmethod
    async def start(cls, make_engine: "Callable[[], Engine]") -> "AsyncEngine":
        """Build the engine in its thread and wait until it is ready. Raises what make_engine raises."""
        self = cls(make_engine, asyncio.get_running_loop())
        await asyncio.wrap_future(self._engine_loop.start())
        return self

    @property
    def model_config(self) -> ModelConfig:
        """Return the model's config."""
        return self._engine_loop.engine.model_config

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """Return the model's tokenizer, or None if its folder has none."""
        return self._engine_loop.engine.tokenizer

    @property
    def limits(self) -> Limits:
        """Return the engine's limits."""
        return self._engine_loop.engine.limits

    @property
    def is_open(self) -> bool:
        """Return whether new requests are accepted."""
        return self.failure is None and not self._is_draining

    @property
    def is_closing(self) -> bool:
        """Return whether it was asked to end; what fails then is not the engine's fault."""
        return self._is_draining

    @property
    def num_seqs(self) -> int:
        """Return the number of unfinished samples, those on their way to the engine included."""
        return sum(len(stream.remaining[request_id]) for request_id, stream in self._streams.items())

    @property
    def queued_tokens(self) -> int:
        """Return an upper bound of the tokens still to compute or to generate."""
        return sum(self.queued_tokens_by_priority().values())

    def queued_tokens_by_priority(self) -> dict[int, int]:
        """Return the same bound for the requests of each priority."""
        found: dict[int, int] = {}
        for request_id, stream in self._streams.items():
            priority = stream.requests[request_id].priority
            found[priority] = found.get(priority, 0) + sum(stream.remaining[request_id].values())
        return found

    def stats(self) -> EngineStats:
        """Return the engine's present statistics."""
        return self._engine_loop.engine.stats()

    def compile(self, structured: Structured) -> None:
        """Compile what completions must obey, in the calling thread, which must not be the event loop's.

        Call it before submit(), or the engine's thread compiles it. Raises what Engine.compile raises.
        """
        self._engine_loop.engine.compile(structured)

    def is_compiled(self, structured: Structured) -> bool:
        """Return whether compile() has nothing to do, without waiting."""
        return self._engine_loop.engine.is_compiled(structured)

    def submit(self, requests: Sequence[Request]) -> OutputStream:
        """Queue requests, whose ids must be new, and return the stream of their outputs.

        Raises EngineError when the engine has failed or is shutting down.
        """
        if self.failure is not None:
            raise self.failure
        if self._is_draining:
            raise EngineError("the engine is shutting down")
        stream = OutputStream(self, requests)
        for request in requests:
            assert request.request_id not in self._streams, f"request {request.request_id!r} is already here"
            self._streams[request.request_id] = stream
        self._engine_loop.submit(requests)
        return stream

    async def drain(self) -> None:
        """Reject new requests, wait until the submitted requests are finished, and end the thread."""
        self._is_draining = True
        if self._streams and self.failure is None:
            self._idle = self._event_loop.create_future()
            await self._idle
        self._engine_loop.close()
        await asyncio.to_thread(self._engine_loop.join)

    def close(self) -> None:
        """Fail all open streams, and end the thread after its present step."""
        self._is_draining = True
        self._fail(EngineError("the engine is shutting down"))
        self._engine_loop.close()

    def _abort_stream(self, stream: OutputStream) -> None:
        ids = tuple(i for i in stream.requests if self._streams.get(i) is stream)
        for request_id in ids:
            del self._streams[request_id]
        if ids:
            self._engine_loop.abort(ids)
            self._check_idle()

    def _check_idle(self) -> None:
        if not self._streams and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # it was closed while the step ran
                continue
            stream._append(output)
            if output.request_id not in stream.remaining:
                del self._streams[output.request_id]
        self._check_idle()

    def _reject(self, request: Request, error: RequestError) -> None:
        stream = self._streams.get(request.request_id)
        if stream is not None:
            stream._fail(error)

    def _fail(self, failure: EngineError) -> None:
        self.failure = failure
        for stream in set(self._streams.values()):
            stream._fail(failure)
        self._streams.clear()
        self._check_idle()

    # The engine's thread calls the methods below.

    def _return_outputs(self, outputs: Sequence[Output]) -> None:
        if outputs:
            self._call_in_event_loop(self._deliver, outputs)

    def _return_rejection(self, request: Request, error: RequestError) -> None:
        self._call_in_event_loop(self._reject, request, error)

    def _return_failure(self, failure: BaseException) -> None:
        logger.error("The engine failed", exc_info=failure)
        self._call_in_event_loop(self._fail, EngineError("the engine failed"))

    def _call_in_event_loop(self, function: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        try:
            self._event_loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed: nothing waits for outputs any more
            logger.debug("the event loop is closed")
