"""/v1/chat/completions: answer a conversation."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from moray.engine.request import Completion, Output
from moray.serve.endpoint import Endpoint
from moray.serve.errors import ApiError
from moray.serve.openai.answer import ResponseBuilder
from moray.serve.openai.logprobs import chat_logprobs
from moray.serve.openai.parameters import priority, sampling_params
from moray.serve.openai.schemas import ChatBody, Message
from moray.serve.openai.streaming import respond


async def chat(endpoint: Endpoint, body: ChatBody, http: HttpRequest) -> Response:
    """Answer a chat completion request. Raises ApiError."""
    endpoint.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "invalid_parameter", "top_logprobs: needs logprobs: true", param="top_logprobs")
    (token_ids,) = await endpoint.encode_chats([conversation(body.messages)])
    names = {
        "logprobs": "top_logprobs",
        "max_tokens": "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    }
    params = sampling_params(
        endpoint,
        body,
        names,
        max_tokens=_max_tokens(endpoint, body, len(token_ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
    )
    generation = endpoint.generate(
        http, [token_ids], params, param="messages", names=names, seed=body.seed, priority=priority(body)
    )
    return await respond(generation, ChatResponseBuilder(endpoint, body, generation), is_stream=bool(body.stream))


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of chat completions."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        logprobs = None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, output.new_logprobs) if output.new_logprobs else None
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def start_choices(self) -> list[dict[str, Any]]:
        start = {"role": "assistant", "content": ""}
        return [{"delta": start, "logprobs": None} for _ in range(self._generation.num_samples)]


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages for a chat template: content is one string, and a developer's message is a system message."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        | message.model_dump(include={"name", "reasoning", "reasoning_content"}, exclude_none=True)
        for message in messages
    ]


def _max_tokens(endpoint: Endpoint, body: ChatBody, num_prompt_tokens: int) -> int:
    """Return how many tokens the request asks for; by default all that the context and the endpoint's cap leave."""
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, requested):
        message = (
            f"max_tokens: is {body.max_tokens}, and max_completion_tokens, its newer name, is {requested}; give one"
        )
        raise ApiError(400, "invalid_parameter", message, param="max_tokens")
    return endpoint.default_max_tokens(num_prompt_tokens) if requested is None else requested
