"""answer() runs a request that comes without HTTP, a line of a batch, by the code of the routes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moray.serve.endpoint import Caller, Endpoint
from moray.serve.errors import ApiError
from moray.serve.openai.answer import ResponseBuilder
from moray.serve.openai.chat import start_chat
from moray.serve.openai.completions import start_completion
from moray.serve.openai.schemas import ChatBody, CompletionBody, GenerationBody


@dataclass(frozen=True)
class Route:
    """Describes a path whose requests can be answered without HTTP.

    body:   model of the request's body
    start:  starts to generate the answer
    """

    body: type[GenerationBody]
    start: Callable[[Endpoint, Any, Caller], Awaitable[ResponseBuilder]]


ROUTES = {
    "/v1/chat/completions": Route(ChatBody, start_chat),
    "/v1/completions": Route(CompletionBody, start_completion),
}


async def answer(endpoint: Endpoint, url: str, body: Any, caller: Caller) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON object with which the path `url`, one of ROUTES, answers a request.

    body: a JSON value

    Only a request that does not stream has such an answer: one that does is answered with 400.
    """
    route = ROUTES[url]
    try:
        parsed = _parse(route, body)
        if parsed.stream:
            raise ApiError(400, "unsupported_value", "stream: true is not supported in a batch", param="stream")
        builder = await route.start(endpoint, parsed, caller)
        try:
            return 200, builder.response(await builder.generation.completions())
        finally:
            builder.generation.close()
    except ApiError as error:
        return error.status, error.body


def _parse(route: Route, body: Any) -> GenerationBody:
    """Validate a body as FastAPI does. Raises ApiError."""
    try:
        return route.body.model_validate(body)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
    raise ApiError.from_body_errors(found)
