"""Models of the OpenAI API's responses, which /openapi.json shows.

The responses themselves are built in answer.py and its subclasses without these models, which would cost time for every
chunk of a stream. Tests compare the responses with these models, and with the openai package's own.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Response(BaseModel):
    """Forbids undeclared fields in all responses."""

    model_config = ConfigDict(extra="forbid")


class Usage(Response):
    """Counts the tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionTable(Response):
    """Holds parallel lists with one entry a token; null for the first token of a prompt, which has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Response):
    """Holds the text of one sample. finish_reason is stop or length."""

    index: int
    text: str
    logprobs: CompletionTable | None
    finish_reason: str


class CompletionResponse(Response):
    """Answers a request for completions.

    A stream sends events of such objects: choices hold what is new, and finish_reason is null until the last one.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Response):
    """Holds a likely token of a position, with its bytes in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """Holds the token of a position, and the most likely ones there."""

    top_logprobs: list[TopLogprob]


class ChatTable(Response):
    """Holds the logprobs of a message, one entry a token. refusal is always null."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Response):
    """Names the function of a call. arguments is the JSON text of an object, cut where the answer was."""

    name: str
    arguments: str


class ToolCall(Response):
    """Holds a call of a tool. type is always function."""

    id: str
    type: str
    function: CalledFunction


class ChatMessage(Response):
    """Holds a message of the assistant. refusal is always null, content is null where it only calls tools.

    reasoning, reasoning_content: the same text under vLLM's two names, where the endpoint splits the reasoning off and
                                  the sample has some; otherwise they are absent
    tool_calls:                   absent where it calls none
    """

    role: str
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Response):
    """Holds the message of one sample. finish_reason is stop, length or tool_calls."""

    index: int
    message: ChatMessage
    logprobs: ChatTable | None
    finish_reason: str


class ChatCompletionResponse(Response):
    """Answers a request for a chat completion.

    A stream sends events of chat.completion.chunk objects, whose choices have a delta instead of a message.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(Response):
    """Describes the model that is served. max_model_len, its context in tokens, is vLLM's field."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Response):
    """Lists the one model that is served."""

    object: str
    data: list[Model]


class Tokens(Response):
    """Answers /tokenize. max_model_len is the model's context, in tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(Response):
    """Answers /detokenize."""

    prompt: str


class ServerState(Response):
    """Answers /health and /ready."""

    status: str


class ErrorDetail(Response):
    """Describes an error. param is the field of the request that is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(Response):
    """Answers a request that fails."""

    error: ErrorDetail


_REASONS = {
    400: "the request is wrong; param and message name the mistake",
    401: "no valid key",
    403: "the endpoint has no keys and serves its own machine only",
    404: "no such model, file, batch or path",
    408: "the body did not arrive in time",
    409: "the batch is over",
    413: "the body is too large",
    429: "too many requests; Retry-After has the seconds to wait",
    431: "the headers are too large",
    501: "the endpoint has no store for files and batches",
    503: "the engine, or the store, is not available; try again",
    504: "the request ran longer than the endpoint's limit",
    507: "the store is full",
}
# A server-sent event: data is a chunk of the answer in JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
GUARDED = (401, 403, 408, 413, 431)  # statuses with which RequestGuardMiddleware refuses
GENERATING = (400, *GUARDED, 404, 429, 503, 504)


def describe_responses(*errors: int, ok: Any = None, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of a route.

    errors:  statuses of the errors that the route may answer with
    ok:      the model of a 200
    stream:  the 200 may be a stream of events too
    """
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _REASONS[status]} for status in sorted(errors)
    }
    if ok is not None:
        found[200] = {"model": ok, "description": "the answer"}
    if stream:
        found[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    return found
