"""Every response, whole or a chunk of a stream, is one of the openai package's types and has no field that these lack.

The package's client takes any JSON for its types; here they validate.
"""

import json
from typing import Any

import pytest
from http_calls import MODEL, call, events
from openai import types
from openai.types import chat, shared
from pydantic import BaseModel
from served import Served

LOGPROBS = {"logprobs": True, "top_logprobs": 2}
CHAT = {"messages": [{"role": "user", "content": "Add 86 and 16."}], "max_completion_tokens": 4}
COMPLETION = {"prompt": "The sum of 86 and 16 is", "max_tokens": 4}


def unknown_fields(value: Any) -> set[str]:
    """Return the fields that a validated value has beyond those of its types."""
    if isinstance(value, list):
        return set().union(*map(unknown_fields, value))
    if not isinstance(value, BaseModel):
        return set()
    known = (getattr(value, name) for name in type(value).model_fields)
    return set(value.model_extra or ()).union(*map(unknown_fields, known))


def check(kind: type[BaseModel], value: Any, beyond: tuple[str, ...] = ()) -> None:
    assert unknown_fields(kind.model_validate(value, strict=True)) == set(beyond)


def post(local: Served, path: str, body: dict[str, Any]) -> str:
    reply = call(f"{local.url}/v1/{path}", {"model": MODEL, "temperature": 0} | body)
    assert reply.status == 200, reply.text
    return reply.text


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"echo": True, "logprobs": 1, "n": 2}])
def test_completions(local: Served, fields: dict[str, Any]) -> None:
    value = json.loads(post(local, "completions", COMPLETION | fields))
    for choice in value["choices"]:
        if "echo" in fields:  # OpenAI's are null too at the first token of a prompt, which its types deny
            lists = choice["logprobs"]
            assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
            lists["token_logprobs"][0], lists["top_logprobs"][0] = 0.0, {}
    check(types.Completion, value)
    assert value["usage"]


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"stream_options": {"include_usage": True}}])
def test_streamed_completions(local: Served, fields: dict[str, Any]) -> None:
    chunks = events(post(local, "completions", COMPLETION | fields | {"stream": True}))
    assert len(chunks) > 1
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # OpenAI's is null too, which its type denies
        check(types.Completion, chunk)


@pytest.mark.parametrize("fields", [{}, LOGPROBS, {"n": 2}])
def test_chats(local: Served, fields: dict[str, Any]) -> None:
    value = json.loads(post(local, "chat/completions", CHAT | fields))
    check(chat.ChatCompletion, value)
    assert value["usage"]


@pytest.mark.parametrize("fields", [{}, LOGPROBS, {"stream_options": {"include_usage": True}}])
def test_streamed_chats(local: Served, fields: dict[str, Any]) -> None:
    chunks = events(post(local, "chat/completions", CHAT | fields | {"stream": True}))
    assert len(chunks) > 1
    for chunk in chunks:
        check(chat.ChatCompletionChunk, chunk)


def test_the_list_of_models_has_one_field_of_vllm(local: Served) -> None:
    (model,) = call(f"{local.url}/v1/models").json["data"]
    check(types.Model, model, beyond=("max_model_len",))


def test_an_error(local: Served) -> None:
    check(shared.ErrorObject, call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": 5}).error)


def test_a_prompt_that_is_null_is_the_beginning_of_a_text(local: Served) -> None:
    """The type of OpenAI's field allows null, and its documentation says that it begins a new document."""
    url, body = f"{local.url}/v1/completions", {"model": MODEL, "max_tokens": 2, "temperature": 0}
    answer = call(url, body | {"prompt": None})
    same = call(url, body | {"prompt": [local.endpoint.tokenizer.first_id]})
    assert answer.status == 200 and answer.json["usage"]["prompt_tokens"] == 1
    assert answer.json["choices"] == same.json["choices"]
    missing = call(url, body)
    assert (missing.status, missing.error["code"]) == (400, "missing_required_parameter")
