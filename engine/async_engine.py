"""AsyncEngine: an asyncio face over an Engine that steps in a thread of its own. The endpoint talks to this."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVarTuple

from engine.errors import EngineError, RequestError
from engine.metrics import Metrics
from engine.request import Output, Request

if TYPE_CHECKING:
    from engine.engine import Engine

logger = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True)
class Load:
    """What is in the engine now.

    seqs, waiting_seqs:   samples, and those of them that have no place in a step yet
    queued_tokens:        tokens still to compute or to generate, at most
    free_blocks, blocks:  of the KV cache; free ones may hold cached prefixes
    """

    seqs: int
    waiting_seqs: int
    queued_tokens: int
    free_blocks: int
    blocks: int


class Stream:
    """What the engine gives some requests. Iterate for lists of Outputs, as many as came since the last.

    Leave it (it is a context manager) and what is not done is aborted. Raises RequestError where the engine refuses
    one of the requests, EngineError where the engine fails.
    """

    def __init__(self, engine: "AsyncEngine", requests: Sequence[Request]) -> None:
        self.requests = {request.request_id: request for request in requests}
        # request_id -> sample -> tokens still to compute or to generate, of those not done
        self.left = {
            request.request_id: dict.fromkeys(
                range(request.num_samples), len(request.prompt_token_ids) + request.params.max_tokens
            )
            for request in requests
        }
        self._engine = engine
        self._came: list[Output] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is not done."""
        self._engine._leave(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Output]:
        while not self._came:
            if self._failure is not None:
                raise self._failure
            if not self.left:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        came, self._came = self._came, []
        return came

    def _take(self, output: Output) -> None:
        """Called in the event loop, as is _fail."""
        self._came.append(output)
        left, max_tokens = self.left[output.request_id], self.requests[output.request_id].params.max_tokens
        left[output.sample] = min(left[output.sample], max_tokens) - len(output.new_token_ids)
        if output.completion is not None:
            del left[output.sample]
            if not left:
                del self.left[output.request_id]
        self._wake()

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True)
class _Abort:
    request_ids: tuple[str, ...]


class AsyncEngine:
    """Runs requests on an Engine. All methods are called in one event loop.

    Commands go to the thread by a queue that it empties between steps; a step's outputs come back in one call into the
    loop. An exception in the engine fails every stream, those to come too, and stays in `failure`.
    """

    engine: "Engine"

    def __init__(self, make_engine: "Callable[[], Engine]", loop: asyncio.AbstractEventLoop) -> None:
        """Use start()."""
        self.failure: EngineError | None = None
        self._loop = loop
        self._commands: SimpleQueue[tuple[Request, ...] | _Abort | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}  # request_id -> the stream it belongs to
        self._is_draining = False
        self._made: asyncio.Future[None] = loop.create_future()
        self._idle: asyncio.Future[None] | None = None
        self._thread = Thread(target=self._work, args=(make_engine,), name="engine", daemon=True)

    @classmethod
    async def start(cls, make_engine: "Callable[[], Engine]") -> "AsyncEngine":
        """Make the engine in its thread (see batch's EngineThread for why there); raises what make_engine raises."""
        self = cls(make_engine, asyncio.get_running_loop())
        self._thread.start()
        await self._made
        return self

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests; their ids must be new. Raises EngineError when the engine failed or is shut down."""
        if self.failure is not None:
            raise self.failure
        if self._is_draining:
            raise EngineError("the engine is shutting down")
        stream = Stream(self, requests)
        for request in requests:
            assert request.request_id not in self._streams, f"request {request.request_id!r} is already here"
            self._streams[request.request_id] = stream
        self._commands.put(tuple(requests))
        self.engine.give_way(min(request.priority for request in requests))
        return stream

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self.failure is None and not self._is_draining

    @property
    def load(self) -> Load:
        scheduler = self.engine.scheduler
        left = [stream.left[request_id] for request_id, stream in self._streams.items()]
        return Load(
            seqs=sum(map(len, left)),
            waiting_seqs=scheduler.num_waiting,
            queued_tokens=sum(sum(samples.values()) for samples in left),
            free_blocks=scheduler.block_manager.num_free,
            blocks=scheduler.block_manager.num_blocks,
        )

    @property
    def metrics(self) -> Metrics:
        return replace(self.engine.metrics)

    async def drain(self) -> None:
        """Refuse new requests, finish those that are here, end the thread."""
        self._is_draining = True
        if self._streams and self.failure is None:
            self._idle = self._loop.create_future()
            await self._idle
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def close(self) -> None:
        """End the thread after its step; streams that are here fail."""
        self._is_draining = True
        self._fail(EngineError("the engine is shutting down"))
        self._commands.put(None)

    def _leave(self, stream: Stream) -> None:
        ids = tuple(i for i in stream.requests if self._streams.get(i) is stream)
        for request_id in ids:
            del self._streams[request_id]
        if ids:
            self._commands.put(_Abort(ids))
            self._check_idle()

    def _check_idle(self) -> None:
        if not self._streams and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # left while the step ran
                continue
            stream._take(output)
            if output.request_id not in stream.left:
                del self._streams[output.request_id]
        self._check_idle()

    def _refuse(self, request_id: str, error: RequestError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream._fail(error)

    def _fail(self, failure: EngineError) -> None:
        self.failure = failure
        for stream in set(self._streams.values()):
            stream._fail(failure)
        self._streams.clear()
        self._check_idle()

    # In the engine's thread.

    def _work(self, make_engine: "Callable[[], Engine]") -> None:
        try:
            self.engine = make_engine()
        except BaseException as failure:
            self._call(self._made.set_exception, failure)
            return
        self._call(self._made.set_result, None)
        try:
            while self._obey():
                outputs = self.engine.step() if self.engine.has_work else []
                if outputs:
                    self._call(self._deliver, outputs)
        except BaseException as failure:
            logger.error("The engine failed", exc_info=failure)
            self._call(self._fail, EngineError("the engine failed"))

    def _obey(self) -> bool:
        """Do what was asked since the last step; with no work, wait to be asked. False: end."""
        while not self._commands.empty() or not self.engine.has_work:
            command = self._commands.get()
            if command is None:
                return False
            if isinstance(command, _Abort):
                for request_id in command.request_ids:
                    self.engine.abort(request_id)
                continue
            for request in command:
                try:
                    self.engine.add(request)
                except RequestError as error:
                    self._call(self._refuse, request.request_id, error)
                    break
        return True

    def _call(self, function: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("the event loop is closed")
