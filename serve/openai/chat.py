"""/v1/chat/completions: answer a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from moray.engine.request import Completion, Output
from moray.engine.text.chat_template import find_variable_mistake
from moray.engine.text.reasoning import ReasoningStream, Split, is_open, split_text
from moray.serve.endpoint import Caller, Endpoint, Generation
from moray.serve.errors import ApiError
from moray.serve.openai.answer import ResponseBuilder
from moray.serve.openai.logprobs import chat_logprobs
from moray.serve.openai.parameters import priority, sampling_params
from moray.serve.openai.schemas import ChatBody, Message
from moray.serve.request_body import UNKNOWN, UNSUPPORTED

EFFORT = "reasoning_effort"


async def start_chat(endpoint: Endpoint, body: ChatBody, caller: Caller) -> "ChatResponseBuilder":
    """Start to generate the answer to a conversation. Raises ApiError."""
    endpoint.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "invalid_parameter", "top_logprobs: needs logprobs: true", param="top_logprobs")
    variables = template_variables(endpoint, body.chat_template_kwargs or {}, body.reasoning_effort)
    (token_ids,) = await endpoint.encode_chats([conversation(body.messages)], variables=variables)
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
        caller, [token_ids], params, param="messages", names=names, seed=body.seed, priority=priority(body)
    )
    return ChatResponseBuilder(endpoint, body, generation)


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of chat completions."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    _body: ChatBody

    def __init__(self, endpoint: Endpoint, body: ChatBody, generation: Generation) -> None:
        super().__init__(endpoint, body, generation)
        self._markers = endpoint.args.markers
        if self._markers is not None:
            prompt = generation.requests[0].prompt_token_ids
            self._begins_open = is_open(self._markers, self._tokenizer, prompt)
            self._splitters = [ReasoningStream(self._markers, self._begins_open) for _ in range(generation.num_samples)]

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        logprobs = None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs)
        split = Split(None, text) if self._markers is None else split_text(text, self._markers, self._begins_open)
        message = {"role": "assistant", "content": split.answer, "refusal": None} | self._reasoning(split)
        return {"message": message, "logprobs": logprobs}

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, output.new_logprobs) if output.new_logprobs else None
        split = Split(None, text) if self._markers is None else self._split(index, text, output)
        new = {"content": split.answer} if split.answer else {}
        return {"delta": self._reasoning(split) | new, "logprobs": logprobs}

    def _split(self, index: int, text: str, output: Output) -> Split:
        """Return what a stream's new text decides, and after the last text the rest."""
        parts = [self._splitters[index].push(text)]
        if output.completion is not None:
            parts.append(self._splitters[index].finish())
        reasoning = "".join(part.reasoning or "" for part in parts)
        return Split(reasoning or None, "".join(part.answer for part in parts))

    def _reasoning(self, split: Split) -> dict[str, str]:
        """Return the fields of the reasoning, if there is some and the request does not leave it out."""
        if split.reasoning is None or self._body.include_reasoning is False:
            return {}
        return dict.fromkeys(("reasoning", "reasoning_content"), split.reasoning)

    def start_choices(self) -> list[dict[str, Any]]:
        start = {"role": "assistant", "content": ""}
        return [{"delta": start, "logprobs": None} for _ in range(self.generation.num_samples)]


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


def template_variables(endpoint: Endpoint, given: Mapping[str, Any], effort: str | None = None) -> dict[str, Any]:
    """Return the variables that a request gives to the chat template.

    given:   its chat_template_kwargs
    effort:  its reasoning_effort

    Raises ApiError where the template does not read one of them.
    """
    variables = dict(given)
    if not variables and effort is None:
        return variables
    known = endpoint.tokenizer.chat_variables
    for name in variables:
        if (mistake := find_variable_mistake(name, known)) is not None:
            param = f"chat_template_kwargs.{name}"
            raise ApiError(400, UNKNOWN, f"{param}: {mistake}", param=param)
    if effort is None or (effort == "none" and EFFORT not in known):
        return variables
    if EFFORT not in known:
        message = f"{EFFORT}: is not supported: this model's chat template does not read it"
        raise ApiError(400, UNSUPPORTED, message, param=EFFORT)
    if variables.setdefault(EFFORT, effort) != effort:
        message = f"{EFFORT}: is {effort!r}, and chat_template_kwargs has {variables[EFFORT]!r}; give one"
        raise ApiError(400, "invalid_parameter", message, param=EFFORT)
    return variables


def _max_tokens(endpoint: Endpoint, body: ChatBody, num_prompt_tokens: int) -> int:
    """Return how many tokens the request asks for; by default all that the context and the endpoint's cap leave."""
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, requested):
        message = (
            f"max_tokens: is {body.max_tokens}, and max_completion_tokens, its newer name, is {requested}; give one"
        )
        raise ApiError(400, "invalid_parameter", message, param="max_tokens")
    return endpoint.default_max_tokens(num_prompt_tokens) if requested is None else requested
