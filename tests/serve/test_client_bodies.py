"""Bodies as clients send them: what one got back is sent again, and fields of other servers ask for nothing."""

from typing import Any

import pytest
from http_calls import MODEL, call, events
from served import Served

USER = {"role": "user", "content": "Add 86 and 16."}
ANSWER = {"role": "assistant", "content": "102"}
NEXT = {"role": "user", "content": "Add 1 and 2."}
# What the openai package's message is with all of its fields, and what others add to it.
OPENAI = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": None,
    "parsed": None,
}


def chat(local: Served, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 6} | fields
    reply = call(f"{local.url}/v1/chat/completions", body)
    assert reply.status == 200, reply.text
    return events(reply.text) if fields.get("stream") else reply.json


def text(answer: Any) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize(
    "added",
    [
        OPENAI,
        {"refusal": "", "annotations": [], "tool_calls": []},
        {"reasoning_content": "86 + 16 = 102"},
        {"reasoning": "86 + 16 = 102", "reasoning_content": None},
        {"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"provider_specific_fields": {"refusal": None}, "function_call": None, "tool_calls": None},
        {"id": "msg_1", "type": "message", "name": "helper", "prefix": False},
        {"content": [{"type": "text", "text": "102", "annotations": None}], "tool_call_id": None},
    ],
)
def test_an_answer_that_is_sent_back(local: Served, added: dict[str, Any]) -> None:
    expected = text(chat(local, messages=[USER, ANSWER, NEXT]))
    assert text(chat(local, messages=[USER, ANSWER | added, NEXT])) == expected


@pytest.mark.parametrize(
    "message",
    [
        USER | {"type": "text"},  # lm-evaluation-harness before 0.4.13
        {"role": "user", "content": [{"type": "text", "text": "Add 86 "}, {"type": "text", "text": "and 16."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": USER["content"], "cache_control": {"type": "ephemeral"}}],
        },
        USER | {"name": None, "id": None, "tool_calls": None},
    ],
)
def test_a_message_in_other_shapes(local: Served, message: dict[str, Any]) -> None:
    assert text(chat(local, messages=[message])) == text(chat(local)) == "102"


def test_name_and_reasoning_reach_the_chat_template(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.name or '' }}{{ m.reasoning_content or '' }}: {{ m.content }}\n{% endfor %}"
    tokenizer = local.endpoint.tokenizer
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    messages = [USER | {"name": "Ada"}, ANSWER | {"reasoning_content": "sum"}]
    tokens = call(f"{local.url}/tokenize", {"messages": messages}).json["tokens"]
    assert tokenizer.decode(tokens) == "Ada: Add 86 and 16.\nsum: 102\n"


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(
            ("n", "stop", "seed", "user", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stream",
             "stream_options", "tools", "tool_choice", "response_format", "max_completion_tokens", "metadata", "store",
             "logprobs", "top_logprobs", "reasoning_effort", "verbosity", "not_yet_known")
        ),
        {"seed": 1.0, "max_tokens": 6.0, "n": 1.0},
        {"max_completion_tokens": 6},
        {"top_logprobs": 0, "logprobs": False},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "length_penalty": 1, "skip_special_tokens": True},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "extra_body": {}, "priority": 0},
        {"stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_fields_that_change_nothing(local: Served, fields: dict[str, Any]) -> None:
    assert text(chat(local, **fields)) == "102"


def test_nulls_of_a_completion(local: Served) -> None:
    body = {"model": MODEL, "prompt": "The sum of 86 and 16 is", "temperature": 0}
    nulls = dict.fromkeys(("echo", "logprobs", "stream", "suffix", "best_of", "max_tokens", "n", "stop", "user"))
    reply = call(f"{local.url}/v1/completions", body | nulls).json
    assert reply["choices"] == call(f"{local.url}/v1/completions", body).json["choices"]
    both = call(f"{local.url}/v1/completions", body | {"n": 2, "best_of": 2}).json
    assert [choice["text"] for choice in both["choices"]] == [" 102"] * 2


def test_no_prompt_begins_a_text(local: Served) -> None:
    first = local.endpoint.tokenizer.first_id
    body = {"model": MODEL, "temperature": 0, "max_tokens": 5, "echo": True}
    found = call(f"{local.url}/v1/completions", body | {"prompt": None}).json
    assert found["choices"] == call(f"{local.url}/v1/completions", body | {"prompt": [first]}).json["choices"]
    assert found["usage"]["prompt_tokens"] == 1
    assert call(f"{local.url}/v1/completions", body).error["code"] == "missing_required_parameter"


def test_the_usage_of_a_stream(local: Served) -> None:
    whole = chat(local)["usage"]
    plain = chat(local, stream=True, stream_options={"include_usage": None, "include_obfuscation": True})
    assert all("usage" not in chunk for chunk in plain)
    *chunks, last = chat(local, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": False})
    assert (last["choices"], last["usage"]) == ([], whole)
    assert all(chunk["usage"] is None for chunk in chunks)
    *chunks, last = chat(local, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and chunks[-1]["usage"] == last["usage"] == whole
