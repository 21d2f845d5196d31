"""Reads conversations in the forms in which people store them, as messages for a chat template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moray.batch.json_values import decode_json
from moray.batch.spec.input_section import MessagesFormat
from moray.batch.stages.block_schemas import Failure
from moray.engine.errors import show

Message = dict[str, Any]
# The roles of ShareGPT's messages.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")


class _Refused(Exception):
    """Says why a conversation cannot be read."""


class ChatReader:
    """Reads conversations: lists of structs or maps, or such a list as JSON text, with OpenAI's or ShareGPT's names.

    format:      which names messages have; auto = from and value where there is no role
    knows_word:  returns whether the chat template has a word (tool_calls, a role)
    """

    def __init__(self, format: MessagesFormat, knows_word: Callable[[str], bool]) -> None:
        self._format = format
        self._knows_word = knows_word

    def read(self, value: Any, *, keeps_nulls: bool = False) -> list[Message] | Failure:
        """Return the messages of a conversation, or a Failure that says what is wrong.

        Fields of messages that are null are left out, and so is what is null in them, unless it is JSON that says so.

        keeps_nulls:  whether the value was JSON. In Arrow's structs a field that other rows have is null
        """
        try:
            messages = _parse(value) if isinstance(value, str) else value if keeps_nulls else _drop_nulls(value)
            if not isinstance(messages, list):
                raise _Refused(f"messages must be a list, is {show(messages)}")
            return [self._read_message(f"message {i}", message) for i, message in enumerate(messages)]
        except _Refused as error:
            return Failure("template", "bad_messages", str(error))

    def _read_message(self, name: str, value: Any) -> Message:
        message = {key: item for key, item in _as_dict(name, value).items() if item is not None}
        if self._is_sharegpt(message):
            message = _rename(name, message)
        if isinstance(message.get("content"), list):
            message["content"] = _join(name, message["content"])
        if "function_call" in message:
            raise _Refused(f"{name}: function_call is not supported; write tool_calls")
        if not message.get("tool_calls", True):
            del message["tool_calls"]
        if "tool_calls" in message:
            self._check_known(name, "tool_calls")
            message["tool_calls"] = _read_calls(name, message["tool_calls"])
            message.setdefault("content", "")  # OpenAI's are null beside calls
        if message.get("role") == "tool":
            self._check_known(name, "tool")
        return message

    def _is_sharegpt(self, message: Message) -> bool:
        if self._format == "auto":
            return "role" not in message and "from" in message and "value" in message
        return self._format == "sharegpt"

    def _check_known(self, name: str, word: str) -> None:
        if not self._knows_word(word):
            what = "has tool_calls" if word == "tool_calls" else f"is of role {word}"
            raise _Refused(f"{name} {what}, which the chat template does not know")


def _parse(text: str) -> Any:
    try:
        return decode_json(text)
    except ValueError as error:
        raise _Refused(f"messages are text that is not JSON: {error}") from None


def _drop_nulls(value: Any) -> Any:
    """Return a value without the fields of dicts that are null, at every depth."""
    if isinstance(value, dict):
        return {name: _drop_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def _as_dict(name: str, value: Any) -> Mapping[str, Any]:
    """Return a struct, or a map, which Arrow returns as a list of pairs, as a dict."""
    if value is None:
        return {}
    if isinstance(value, list) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return dict(value)
    if not isinstance(value, dict):
        raise _Refused(f"{name} must have role and content, is {show(value)}")
    return value


def _rename(name: str, message: Message) -> Message:
    """Return a message of ShareGPT under OpenAI's names."""
    sender = message.get("from")
    if not isinstance(sender, str) or sender not in _ROLES:
        raise _Refused(f"{name}: from must be one of {', '.join(_ROLES)}, is {show(sender)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": _ROLES[sender], "content": message.get("value")} | rest


def _join(name: str, parts: Sequence[Any]) -> str:
    """Return the text of a content in parts, as the endpoint joins it."""
    texts = []
    for number, value in enumerate(parts):
        part = _as_dict(f"part {number} of {name}", value)
        kind, text = part.get("type", "text"), part.get("text")
        if kind not in _TEXT_PARTS:
            raise _Refused(f"part {number} of {name} is of type {show(kind)}; the model reads text parts only")
        if not isinstance(text, str):
            raise _Refused(f"part {number} of {name} must have a text, is {show(text)}")
        texts.append(text)
    return "".join(texts)


def _read_calls(name: str, calls: Any) -> list[Any]:
    """Return tool calls with their arguments as values: OpenAI writes JSON text, templates write JSON of values."""
    if not isinstance(calls, list):
        raise _Refused(f"tool_calls of {name} must be a list, is {show(calls)}")
    found = []
    for number, value in enumerate(calls):
        call = dict(_as_dict(f"tool call {number} of {name}", value))
        function = dict(_as_dict(f"function of tool call {number} of {name}", call.get("function")))
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = decode_json(function["arguments"])
            except ValueError as error:
                raise _Refused(f"arguments of tool call {number} of {name} are not JSON: {error}") from None
        found.append(call | {"function": function})
    return found
