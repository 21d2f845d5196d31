"""/v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from engine.request import Completion, Output
from serve.endpoint import Endpoint
from serve.openai.answer import Answer
from serve.openai.errors import ApiError
from serve.openai.logprobs import chat_logprobs
from serve.openai.parameters import priority, sampling_params
from serve.openai.schemas import ChatBody, Message
from serve.openai.streaming import respond


async def chat(endpoint: Endpoint, body: ChatBody, http: HttpRequest) -> Response:
    endpoint.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "invalid_parameter", "top_logprobs needs logprobs: true", param="top_logprobs")
    (token_ids,) = await endpoint.encode_chats([conversation(body.messages)])
    params = sampling_params(
        endpoint,
        body,
        max_tokens=_max_tokens(endpoint, body, len(token_ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
    )
    run = endpoint.run(http, [token_ids], params, seed=body.seed, priority=priority(body))
    return await respond(run, ChatAnswer(endpoint, body, run), is_stream=body.stream)


class ChatAnswer(Answer):
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
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None} for _ in range(self._run.num_samples)]


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template wants them: content in one piece, a developer's as the system's."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]


def _max_tokens(endpoint: Endpoint, body: ChatBody, num_prompt_tokens: int) -> int:
    """What is asked for; by default all that the context and the endpoint's cap leave."""
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        message = "max_tokens is the older name of max_completion_tokens: give one of them"
        raise ApiError(400, "invalid_parameter", message, param="max_tokens")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return endpoint.default_max_tokens(num_prompt_tokens) if asked is None else asked
