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


def test_variables_reach_the_chat_template(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }} {{ reasoning_effort or 'no' }} {{ style if style is defined }}"
    tokenizer = local.endpoint.tokenizer
    plain = chat(local)["usage"]["prompt_tokens"]
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    tokens = call(f"{local.url}/tokenize", {"messages": [USER], "chat_template_kwargs": {"style": 5}}).json["tokens"]
    assert tokenizer.decode(tokens) == "Add 86 and 16. no 5" and len(tokens) != plain

    def prompt_tokens(**fields: Any) -> int:
        count: int = chat(local, **fields)["usage"]["prompt_tokens"]
        return count

    for fields in ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        assert prompt_tokens(**fields) == len(tokenizer.encode_chat([USER], None, {"reasoning_effort": "high"}))
    assert prompt_tokens(reasoning_effort="none") == len(tokenizer.encode_prompts(["Add 86 and 16. none "])[0])
    for fields, param in (
        ({"chat_template_kwargs": {"stile": 5}}, "chat_template_kwargs.stile"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}, "reasoning_effort"),
    ):
        reply = call(f"{local.url}/v1/chat/completions", {"model": MODEL, "messages": [USER]} | fields)
        assert (reply.status, reply.error["param"]) == (400, param) and reply.error["message"].startswith(param)


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


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        (None, (None, "102")),
        ({"start": "1", "end": "0"}, ("", "2")),
        ({"start": "[", "end": "02"}, ("1", "")),
        ({"start": "10", "end": "]"}, ("2", "")),
    ],
)
def test_reasoning_is_a_field_of_its_own(
    local: Served, monkeypatch: pytest.MonkeyPatch, reasoning: Any, expected: tuple[str | None, str]
) -> None:
    args = local.endpoint.args.model_copy(update={"reasoning": reasoning})
    monkeypatch.setattr(local.endpoint, "args", args)
    message = chat(local)["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == expected
    assert message.get("reasoning") == message.get("reasoning_content")
    assert "reasoning" not in chat(local, include_reasoning=False)["choices"][0]["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chat(local, stream=True)]
    streamed = ["".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning", "content")]
    if reasoning is not None and reasoning["start"] == "[":  # a stream cannot know that an end will come
        expected = None, "102"
    assert streamed == [expected[0] or "", expected[1]]
    assert ["reasoning" in delta for delta in deltas] == ["reasoning_content" in delta for delta in deltas]
