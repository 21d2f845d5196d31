"""Every field of OpenAI's requests, as the installed openai package declares them: each value its types allow is taken,
or refused by the field's name. A newer package with new fields makes this fail, and names them."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pytest
from http_calls import MODEL, Reply, call
from openai.types import chat
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from served import Served
from typing_extensions import is_typeddict

from moray.serve.openai.refusals import CHAT, COMPLETION
from moray.serve.request_body import UNKNOWN, UNSUPPORTED, UNSUPPORTED_VALUE

USER = {"role": "user", "content": "Add 86 and 16."}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [USER], "max_completion_tokens": 1},
    "/v1/completions": {"model": MODEL, "prompt": "Add", "max_tokens": 1},
}
KINDS = {
    "/v1/chat/completions": chat_params.CompletionCreateParamsNonStreaming,
    "/v1/completions": completion_params.CompletionCreateParamsNonStreaming,
}
FIELDS = [
    (path, name, hint)
    for path, kind in KINDS.items()
    for name, hint in (get_type_hints(kind) | {"stream": bool | None}).items()
    if name not in ("model", "messages")
]
MESSAGES: dict[str, Any] = {
    "assistant": chat.ChatCompletionAssistantMessageParam,
    "developer": chat.ChatCompletionDeveloperMessageParam,
    "function": chat.ChatCompletionFunctionMessageParam,
    "system": chat.ChatCompletionSystemMessageParam,
    "tool": chat.ChatCompletionToolMessageParam,
    "user": chat.ChatCompletionUserMessageParam,
}
# What the types allow and the documentation does not.
NOT_ALLOWED = {("top_logprobs", "1"), ("content", "None"), ("content", "[]"), ("prompt", "[]"), ("prompt", "[[]]")} | {
    ("tool_choice", "'required'"),
    ("tool_choice", "{'function': {'name': 'x'}, 'type': 'function'}"),
    ("tool_choice", "{'type': 'function', 'function': {'name': 'x'}}"),
}  # fmt: skip


def required(hints: dict[str, Any]) -> list[str]:
    return [name for name, hint in hints.items() if get_origin(hint) is Required]


def values(hint: Any) -> Iterator[Any]:
    """Make a few values of a type, each of a union's and a literal's among them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Annotated, Required, NotRequired):
        yield from values(arguments[0])
    elif origin is Literal:
        yield from arguments
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from values(argument)
    elif is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        for keys in (required(hints), hints.keys()):
            yield {key: next(values(hints[key])) for key in keys}
    elif origin is dict or hint is object:
        yield {}
    elif origin is not None:  # a sequence
        yield []
        yield from ([value] for value in values(arguments[0]))
    else:
        yield from {str: ["x"], bool: [True, False], int: [1], float: [0.5], types.NoneType: [None]}[hint]


def check(reply: Reply, param: str, name: str, value: Any) -> None:
    if reply.status == 200:
        return
    assert reply.status == 400, reply
    error = reply.error
    assert error["param"].startswith(param), error
    assert error["code"] != UNKNOWN, f"the openai package has a field {param} that is neither taken nor refused"
    if (name, repr(value)) not in NOT_ALLOWED:
        assert error["code"] in (UNSUPPORTED, UNSUPPORTED_VALUE), (value, error)
        assert error["message"].startswith(error["param"]), error


@pytest.mark.parametrize(("path", "name", "hint"), FIELDS, ids=[f"{path}-{name}" for path, name, _ in FIELDS])
def test_every_field(local: Served, path: str, name: str, hint: Any) -> None:
    made = list(values(hint))
    assert made
    for value in made:
        check(call(f"{local.url}{path}", BODIES[path] | {name: value}), name, name, value)
    assert call(f"{local.url}{path}", BODIES[path] | {name: None}).status == 200


@pytest.mark.parametrize("role", MESSAGES)
def test_every_field_of_a_message(local: Served, role: str) -> None:
    hints = get_type_hints(MESSAGES[role], include_extras=True)
    smallest = {name: next(values(hints[name])) for name in required(hints)} | {"content": "hi"}
    for name, hint in hints.items():
        for value in values(hint):
            body = {"model": MODEL, "messages": [USER, smallest | {name: value}, USER], "max_tokens": 1}
            check(call(f"{local.url}/v1/chat/completions", body), "messages[1].", name, value)


def test_no_union_of_messages_is_missing() -> None:
    assert set(get_args(chat.ChatCompletionMessageParam)) == set(MESSAGES.values())


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/chat/completions", name) for name in CHAT] + [("/v1/completions", name) for name in COMPLETION],
)
def test_every_refusal_is_by_name_and_its_neutral_values_are_taken(local: Served, path: str, name: str) -> None:
    refusal = (CHAT if "chat" in path else COMPLETION)[name]
    refused = call(f"{local.url}{path}", BODIES[path] | {name: {"unlikely": 1}})
    assert refused.error["param"] == name and refused.error["message"] == f"{name}: {refusal.why}"
    for value in (None, *refusal.neutral):
        assert call(f"{local.url}{path}", BODIES[path] | {name: value}).status == 200
