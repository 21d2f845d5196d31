"""From a run to its response: as a whole, or as server-sent events, where what a step gave goes out at once."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.request import Output
from serve.endpoint import Run
from serve.openai.answer import Answer
from serve.openai.errors import ApiError

DONE = b"data: [DONE]\n\n"


async def respond(run: Run, answer: Answer, *, is_stream: bool) -> Response:
    """Raises ApiError for what goes wrong before the first token: then the status can still say it."""
    try:
        first = await run.next()
        if is_stream:
            return EventStream(run, _events(run, answer, first))
        response = JSONResponse(answer.whole(await run.completions(first)))
    except BaseException:
        run.close()
        raise
    run.close()
    return response


class EventStream(StreamingResponse):
    """The events of a run, which it closes. The guard looks out for the client, so nothing here has to."""

    def __init__(self, run: Run, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            self._run.close()


async def _events(run: Run, answer: Answer, outputs: list[Output]) -> AsyncIterator[bytes]:
    message = _encode(answer.start_chunks())
    try:
        while outputs:
            message += _encode(chunk for output in outputs for chunk in answer.chunks(output))
            if message:
                yield message
            message, outputs = b"", await run.next()
        yield _encode(answer.end_chunks()) + DONE
    except ApiError as error:  # the status is out: the error is an event
        yield _encode([error.body]) + DONE


def _encode(events: Iterable[dict[str, Any]]) -> bytes:
    texts = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()
