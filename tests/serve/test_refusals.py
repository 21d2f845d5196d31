"""What the endpoint refuses: by name, in OpenAI's shape, before anything runs."""

from typing import Any

import pytest
from http_calls import MODEL, call, events
from served import Served

USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported by this endpoint"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'response_format' is not supported"),
        ({"best_of": 3}, "best_of", "'best_of' is not supported by this endpoint"),
        ({"suffix": "end"}, "suffix", "'suffix' is not supported by this endpoint"),
        ({"temprature": 0}, "temprature", "'temprature' is not supported by this endpoint"),
        ({"stream_options": {"continuous": True}}, "stream_options.continuous",
         "'stream_options.continuous' is not supported by this endpoint"),
        ({"temperature": -1}, "temperature", "temperature: must be a number, between 0.0 and 10.0, is -1.0"),
        ({"temperature": "0"}, "temperature", "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p", "top_p: must be above 0 (use temperature 0 for greedy), is 0"),
        ({"n": 0}, "n", "n: must be a whole number, between 1 and 128, is 0"),
        ({"n": True}, "n", "n: Input should be a valid integer"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: must be a whole number"),
        ({"logprobs": 21}, "logprobs", "logprobs: must be a whole number, between 0 and 20, is 21"),
        ({"seed": 2**70}, "seed", "seed: must be a whole number"),
        ({"stop": ""}, "stop", "stop: must be a list of strings that are not empty"),
        ({"stop": [1]}, "stop", "stop: Input should be a valid string"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "logit_bias: keys are token ids, 'five' is none"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias: bias of token 5 must be between -100 and 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias: the model's token ids end at"),
        ({"min_tokens": 20}, "min_tokens", "min_tokens: must be at most max_tokens (16), is 20"),
        ({"prompt": []}, "prompt", "prompt: the list is empty"),
        ({"prompt": ""}, "prompt", "the prompt is empty: no token comes of it"),
        ({"prompt": [[]]}, None, "the prompt has no tokens; it needs at least 1."),
        ({"prompt": [5, -1]}, None, "the prompt has token id -1; this model's go from 0 to"),
        ({"prompt": [5, "a"]}, "prompt", "prompt: Input should be a valid"),
        ({"prompt": "\ud800"}, "prompt", "the prompt is not valid Unicode at character 0"),
        ({"max_tokens": 5000}, None, "needs 5,001 tokens (prompt 1 + max_tokens 5,000); this engine holds 2,048."),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo", "echo with logprobs is not supported in a stream"),
    ],
)  # fmt: skip
def test_completions(local: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5]} | fields)
    assert reply.status == 400
    assert reply.error["message"].startswith(message) and reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error" and reply.error["code"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages must be a list that is not empty"),
        ({"messages": [{"role": "user"}]}, "messages", "'messages.0.content' is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages: Input should be 'system', "),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages", "messages: Input should be"),
        ({"messages": [USER | {"content": None}]}, "messages", "messages: Input should be a valid string"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "max_tokens is the older name"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs: true"),
        ({"logprobs": 2}, "logprobs", "logprobs: Input should be a valid boolean"),
        ({"service_tier": "fast"}, "service_tier", "service_tier: Input should be 'auto', "),
        ({"functions": [{"name": "f"}]}, "functions", "'functions' is not supported by this endpoint"),
        ({"messages": [USER | {"content": "a " * 3000}]}, None, "needs "),
    ],
)  # fmt: skip
def test_chats(local: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    reply = call(f"{local.url}/v1/chat/completions", {"model": MODEL, "messages": [USER]} | fields)
    assert reply.status == 400, reply
    assert reply.error["message"].startswith(message) and reply.error["param"] == param


def test_what_asks_for_nothing_is_taken(local: Served) -> None:
    nothing = {
        "tools": [], "response_format": {"type": "text"}, "tool_choice": "auto", "store": False, "suffix": None,
        "stop": None, "seed": None, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "temperature": None,
    }  # fmt: skip
    body = {"model": MODEL, "messages": [USER], "max_tokens": 2} | nothing
    assert call(f"{local.url}/v1/chat/completions", body).status == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b"", "invalid_json"), (b"[1]", "invalid_json"), (b"\xff", "invalid_request")],
)
def test_bodies_that_are_none(local: Served, body: bytes, code: str) -> None:
    reply = call(f"{local.url}/v1/completions", body)
    assert (reply.status, reply.error["code"]) == (400, code)


def test_paths_and_methods_that_are_not_there(local: Served) -> None:
    assert (call(f"{local.url}/v2").status, call(f"{local.url}/v2").error["code"]) == (404, "not_found")
    reply = call(f"{local.url}/v1/completions")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")


def test_a_stream_that_cannot_begin_is_refused_by_its_status(local: Served) -> None:
    body = {"model": MODEL, "prompt": [10**6], "stream": True}
    assert call(f"{local.url}/v1/completions", body).status == 400


def test_a_request_that_is_refused_in_part_runs_in_no_part(local: Served) -> None:
    before = local.endpoint.engine.load.free_blocks
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [[5], [10**6], [6]], "max_tokens": 1000})
    assert reply.status == 400
    end = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5], "max_tokens": 1, "stream": True})
    assert len(events(end.text)) >= 1
    assert local.endpoint.engine.load.seqs == 0 and local.endpoint.engine.load.free_blocks == before


def test_a_bug_shows_no_stack_trace(local: Served, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def bug(prompt: str) -> list[int]:
        raise KeyError(prompt)

    monkeypatch.setattr(local.endpoint, "encode_prompts", bug)
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": "my secret"})
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in reply.text and "Traceback" not in reply.text
    assert "KeyError" in caplog.text and "secret" not in caplog.text
