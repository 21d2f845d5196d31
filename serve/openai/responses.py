"""Responses of the OpenAI API, as /openapi.json describes them. What is sent is made in answer.py and its kin, without
these models, which would cost every chunk of a stream its time; a test holds the two together."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionTable(Reply):
    """Lists side by side, one entry a token; null for a token that nothing came before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """finish_reason: stop or length."""

    index: int
    text: str
    logprobs: CompletionTable | None
    finish_reason: str


class CompletionReply(Reply):
    """With stream: true, events of such objects: choices hold what is new, finish_reason is null but in the last."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatTable(Reply):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Reply):
    role: str
    content: str
    refusal: None


class ChatChoice(Reply):
    """finish_reason: stop or length."""

    index: int
    message: ChatMessage
    logprobs: ChatTable | None
    finish_reason: str


class ChatReply(Reply):
    """With stream: true, events of chat.completion.chunk objects, whose choices have a delta instead of a message."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(Reply):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply):
    object: str
    data: list[Model]


class Tokens(Reply):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(Reply):
    prompt: str


class State(Reply):
    status: str


class ErrorDetail(Reply):
    """param: the part of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(Reply):
    error: ErrorDetail


_REASONS = {
    400: "the request is wrong; param and message say where",
    401: "no valid key",
    403: "without keys only the endpoint's own machine is served",
    404: "no such model, or path",
    408: "the body did not come in time",
    413: "the body is too large",
    429: "too many requests; Retry-After says when to come again",
    431: "the headers are too large",
    503: "the engine is not there; try again",
    504: "the request took longer than it may",
}
# data: a chunk of the answer in JSON, or [DONE]
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
GUARDED = (401, 403, 408, 413, 431)
GENERATING = (400, *GUARDED, 404, 429, 503, 504)


def replies(*errors: int, ok: Any = None, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: the model of a 200, and the errors that may come instead."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": _REASONS[status]} for status in sorted(errors)
    }
    if ok is not None:
        found[200] = {"model": ok, "description": "the answer"}
    if stream:
        found[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    return found
