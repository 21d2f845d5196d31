"""Convert the messages of a request to those that chat templates read."""

import json
from collections.abc import Sequence
from typing import Any

from moray.engine.errors import show
from moray.engine.text.chat_template import shows_tool_calls
from moray.engine.text.tokenizer import Tokenizer
from moray.serve.errors import ApiError
from moray.serve.openai.schemas import Message
from moray.serve.openai.tool_fields import ToolCallParam
from moray.serve.request_body import INVALID, UNSUPPORTED, UNSUPPORTED_VALUE


def conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages for a chat template: content is one string, and a developer's message is a system message.

    Raises ApiError for calls of tools, and their results, where the chat template does not show them.
    """
    return [_convert(tokenizer, number, message) for number, message in enumerate(messages)]


def _convert(tokenizer: Tokenizer, number: int, message: Message) -> dict[str, Any]:
    place = f"messages[{number}]"
    converted = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _join(message),
        **message.model_dump(include={"name", "reasoning", "reasoning_content"}, exclude_none=True),
    }
    if message.role == "tool":
        _check_template(tokenizer, f"{place}.role", "'tool' is", UNSUPPORTED_VALUE)
        converted["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        param = f"{place}.tool_calls"
        _check_template(tokenizer, param, "is", UNSUPPORTED)
        converted["tool_calls"] = [_convert_call(f"{param}[{i}]", call) for i, call in enumerate(message.tool_calls)]
    return converted


def _join(message: Message) -> str:
    """Return the content as one text; nothing where an answer only calls tools."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "".join(part.text for part in message.content)


def _check_template(tokenizer: Tokenizer, param: str, what: str, code: str) -> None:
    if not shows_tool_calls(tokenizer.tool_template):
        message = f"{param}: {what} not supported: this model's chat template shows no calls of tools and no results"
        raise ApiError(400, code, message, param=param)


def _convert_call(place: str, call: ToolCallParam) -> dict[str, Any]:
    """Convert a call: templates take its arguments as an object, which they write in the model's own way."""
    param = f"{place}.function.arguments"
    try:
        arguments: Any = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        message = f"{param}: must be the JSON text of an object, is {show(call.function.arguments)}"
        raise ApiError(400, INVALID, message, param=param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
