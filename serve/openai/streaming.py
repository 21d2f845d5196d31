"""Send a generation's response: as a whole, or as server-sent events, where each step's output is sent at once."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moray.engine.request import Output
from moray.serve.endpoint import Generation
from moray.serve.errors import ApiError
from moray.serve.openai.answer import ResponseBuilder

DONE = b"data: [DONE]\n\n"


async def respond(builder: ResponseBuilder, *, is_stream: bool) -> Response:
    """Answer a request by HTTP, and close its generation at the end.

    Waits for the first token also where it streams, so that an error before it becomes the response's status.
    Raises ApiError.
    """
    generation = builder.generation
    try:
        first = await generation.next()
        if is_stream:
            return EventStream(generation, _events(generation, builder, first))
        response = JSONResponse(builder.response(await generation.completions(first)))
    except BaseException:
        generation.close()
        raise
    generation.close()
    return response


class EventStream(StreamingResponse):
    """Streams the events of a generation and closes it. RequestGuardMiddleware watches for a disconnected client."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            self._generation.close()


async def _events(generation: Generation, builder: ResponseBuilder, outputs: list[Output]) -> AsyncIterator[bytes]:
    message = _encode(builder.start_chunks())
    try:
        while outputs:
            message += _encode(chunk for output in outputs for chunk in builder.chunks(output))
            if message:
                yield message
            message, outputs = b"", await generation.next()
        yield _encode(builder.end_chunks()) + DONE
    except ApiError as error:  # the status has been sent, so the error is an event
        yield _encode([error.body]) + DONE


def _encode(events: Iterable[dict[str, Any]]) -> bytes:
    texts = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()
