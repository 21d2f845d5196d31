"""Calls of tools: forced ones with every model, free ones where the chat template shows its model's format."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from http_calls import MODEL, call, events
from made_jobs import TINY
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from served import Served, served

from moray.engine.structured.constraint import Structured
from moray.serve.grammar_compiler import Constraint
from moray.serve.openai.tools import ToolUse

USER = {"role": "user", "content": "Add 86 and 16."}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "note": {"type": "string", "maxLength": 5}},
    "required": ["a", "note"],
    "$defs": {"digit": DIGIT},
}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds; x ::= y", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "look_up", "parameters": {"properties": {"b::=": DIGIT}}}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "add"}}
# Its families' templates, in short.
QWEN = """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% if m.role == "tool" %} <tool_response>{% endif %}\n{% endfor %}"""
MARKER, MARKER_ID = "[TOOL_CALLS]", 1011  # the first id that the tiny model's tokenizer does not use
MISTRAL = QWEN.replace("<tool_call>", MARKER).replace("</tool_call>", "")


def chat(local: Served, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [USER], "temperature": 1, "max_tokens": 80, "tools": [ADD, OTHER, NOW]}
    reply = call(f"{local.url}/v1/chat/completions", body | fields)
    assert reply.status == 200, reply.text
    if fields.get("stream"):
        chunks = events(reply.text)
        assert all(ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks)
        return chunks
    ChatCompletion.model_validate(reply.json, strict=True)
    return reply.json


def check_call(made: dict[str, Any]) -> None:
    assert made["type"] == "function" and made["id"]
    name, arguments = made["function"]["name"], json.loads(made["function"]["arguments"])
    schema = {
        "add": PARAMETERS,
        "look_up": {"type": "object", "properties": {"b::=": DIGIT}},
        "now": {"maxProperties": 0},
    }
    assert jsonschema_rs.validator_for(schema[name]).is_valid(arguments), made


def test_a_named_tool_is_called(local: Served) -> None:
    choices = chat(local, tool_choice=NAMED, n=4, parallel_tool_calls=False)["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop" and choice["message"]["content"] is None
        (made,) = choice["message"]["tool_calls"]
        check_call(made)
        assert made["function"]["name"] == "add"
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 4


def test_a_required_call_is_one_of_the_tools(local: Served) -> None:
    choices = chat(local, tool_choice="required", n=12, seed=1)["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "tool_calls"
        (made,) = choice["message"]["tool_calls"]
        check_call(made)
    assert len({choice["message"]["tool_calls"][0]["function"]["name"] for choice in choices}) > 1


def test_none_is_a_chat_without_tools(local: Served) -> None:
    answer = chat(local, tool_choice="none", temperature=0)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "102", "refusal": None}
    assert answer["usage"] == chat(local, tools=[], temperature=0)["usage"]


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_streamed_call(local: Served, choice: Any) -> None:
    whole = chat(local, tool_choice=choice, seed=2, n=2)
    *chunks, last = chat(local, tool_choice=choice, seed=2, n=2, stream=True, stream_options={"include_usage": True})
    assert last["usage"] == whole["usage"]
    for expected in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == expected["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": None}
        deltas = [delta for one in own for delta in one["delta"].get("tool_calls", [])]
        assert deltas[0]["id"] and deltas[0]["function"]["name"] and not any("id" in delta for delta in deltas[1:])
        (made,) = expected["message"]["tool_calls"]
        assert deltas[0]["function"]["name"] == made["function"]["name"]
        assert "".join(delta["function"]["arguments"] for delta in deltas) == made["function"]["arguments"]
        assert [one["finish_reason"] for one in own[-2:]][-1] == expected["finish_reason"]


def test_a_call_that_max_tokens_cuts(local: Served) -> None:
    (choice,) = chat(local, tool_choice=NAMED, max_tokens=26)["choices"]
    assert choice["finish_reason"] == "length"
    (made,) = choice["message"]["tool_calls"]
    assert made["function"]["arguments"].startswith("{")
    (nothing,) = chat(local, tool_choice=NAMED, max_tokens=3)["choices"]
    assert "tool_calls" not in nothing["message"] and nothing["message"]["content"] == ""


def test_logprobs_of_a_call_are_those_of_its_text(local: Served) -> None:
    (choice,) = chat(local, tool_choice=NAMED, logprobs=True)["choices"]
    text = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert json.loads(text) == {
        "name": "add", "arguments": json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]),
    }  # fmt: skip


def test_the_model_is_told_of_the_tools(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    encode = local.endpoint.tokenizer.encode_texts

    def note(texts: list[str], **options: Any) -> list[list[int]]:
        shown.extend(texts)
        return encode(texts, **options)

    monkeypatch.setattr(local.endpoint.tokenizer, "encode_texts", note)
    chat(local, tool_choice=NAMED, max_tokens=1)
    assert shown[-1].startswith("<|system|>\nAnswer with a call of this function, as JSON")
    (shown_tool,) = [line for line in shown[-1].splitlines() if line.startswith('{"name"')]  # the one that it must call
    assert json.loads(shown_tool.removesuffix("<|end|>")) == ADD["function"]
    chat(local, tool_choice="required", max_tokens=1, messages=[{"role": "developer", "content": "Be brief."}, USER])
    assert shown[-1].startswith("<|system|>\nBe brief.\n\nAnswer with a call of one of these functions")
    monkeypatch.setattr(local.endpoint.tokenizer._tokenizer, "chat_template", QWEN)
    chat(local, tool_choice=NAMED, max_tokens=1)
    described = [json.loads(line) for line in shown[-1].splitlines()[:3]]
    assert described[0] == ADD and described[2]["function"] == {
        "name": "now", "parameters": {"type": "object", "properties": {}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text", "content", "names"),
    [
        (QWEN, "102", "102", []),
        (QWEN, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', None, ["add"]),
        (QWEN, 'Sure. <tool_call>{"name":"f"}</tool_call>\n<tool_call>{"name":"g"}</tool_call>', "Sure.", ["f", "g"]),
        (MISTRAL, 'Sure.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "Sure.", ["add"]),
    ],
)
def test_free_calls_are_read(
    local: Served, monkeypatch: pytest.MonkeyPatch, template: str, text: str, content: str | None, names: list[str]
) -> None:
    """The small model calls no tools by itself: what it writes is forced."""
    monkeypatch.setattr(local.endpoint.tokenizer._tokenizer, "chat_template", template)
    forced = Constraint("tools", lambda: Structured.from_value("choice", [text]))
    monkeypatch.setattr(ToolUse, "constraint", forced)
    (choice,) = chat(local)["choices"]
    calls = choice["message"].get("tool_calls", [])
    assert (choice["message"]["content"], [made["function"]["name"] for made in calls]) == (content, names)
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    assert all(len(made["id"]) == 9 for made in calls) or template is QWEN
    chunks = chat(local, stream=True, tool_choice="auto")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
    made = [one for delta in deltas for one in delta.get("tool_calls", [])]
    assert [one["function"]["name"] for one in made] == names and [one["index"] for one in made] == list(
        range(len(names))
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    (single,) = chat(local, parallel_tool_calls=False)["choices"]
    assert len(single["message"].get("tool_calls", [])) == min(1, len(names))


def test_what_cannot_be_read_is_refused(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    url, body = f"{local.url}/v1/chat/completions", {"model": MODEL, "messages": [USER], "tools": [ADD]}
    monkeypatch.setattr(local.endpoint.tokenizer._tokenizer, "chat_template", "{{ tools }}<function=")
    reply = call(url, body)
    assert (reply.error["param"], reply.error["code"]) == ("tools", "unsupported_parameter")
    assert "calls in this model's own format are not read" in reply.error["message"]
    monkeypatch.setattr(local.endpoint.tokenizer._tokenizer, "chat_template", QWEN)
    strict = ADD | {"function": ADD["function"] | {"strict": True}}
    reply = call(url, body | {"tools": [strict]})
    assert reply.error["param"] == "tools[0].function.strict"
    assert call(url, body | {"tools": [strict], "tool_choice": "required", "max_tokens": 4}).status == 200


def test_results_reach_a_template_that_shows_them(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.endpoint.tokenizer._tokenizer, "chat_template", QWEN)
    made = {"id": "c1", "type": "function", "index": 0, "function": {"name": "add", "arguments": '{"a":1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "102"}]},
    ]
    tokens = call(f"{local.url}/tokenize", {"messages": messages}).json["tokens"]
    assert local.endpoint.tokenizer.decode(tokens) == (
        'user: Add 86 and 16.assistant: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "tool: 102 <tool_response>"
    )
    no_content = [USER, {"role": "assistant", "tool_calls": [made]}, messages[2]]
    assert call(f"{local.url}/tokenize", {"messages": no_content}).json["tokens"] == tokens
    for arguments in ("{", "[1]", '"a"'):
        wrong = made | {"function": {"name": "add", "arguments": arguments}}
        reply = call(f"{local.url}/tokenize", {"messages": [USER, {"role": "assistant", "tool_calls": [wrong]}]})
        assert reply.error["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An endpoint whose tokenizer has [TOOL_CALLS] as Mistral's has it: one special token, which begins the calls."""
    folder = tmp_path_factory.mktemp("mistral") / MODEL
    shutil.copytree(TINY, folder)
    token = {"content": MARKER, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(token | {"id": MARKER_ID, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(MARKER_ID)] = token | {"special": True}
    config["chat_template"] = MISTRAL
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with served(model=str(folder)) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    ("before", "calls", "content", "names"),
    [
        ("", ' [{"name": "add", "arguments": {"a": 1, "note": "é"}}]', None, ["add"]),
        ("Yes.", ' [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]', "Yes.", ["add", "now"]),
        ("Sure.", " [{", "Sure.[TOOL_CALLS] [{", []),
    ],
)  # fmt: skip
def test_a_special_token_begins_the_calls(
    mistral: Served, monkeypatch: pytest.MonkeyPatch, before: str, calls: str, content: str | None, names: list[str]
) -> None:
    """The small model calls no tools by itself: its tokens are forced, the marker by its id."""
    lark = f"start: {json.dumps(before)} <[{MARKER_ID}]> {json.dumps(calls)}"
    monkeypatch.setattr(ToolUse, "constraint", Constraint("tools", lambda: Structured.from_value("grammar", lark)))
    answer = chat(mistral, tool_choice="auto", logprobs=True)
    (choice,) = answer["choices"]
    made = choice["message"].get("tool_calls", [])
    assert (choice["message"]["content"], [one["function"]["name"] for one in made]) == (content, names)
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    sampled = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert sampled.count(MARKER) == 1 and answer["usage"]["completion_tokens"] >= len(sampled)
    if names:
        assert json.loads(made[0]["function"]["arguments"]) == json.loads(calls)[0]["arguments"]
    for fields in ({}, {"logprobs": True}):  # tokens that come several at once, and one by one
        chunks = chat(mistral, tool_choice="auto", stream=True, **fields)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
        parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
        assert [(part["index"], part["function"]) for part in parts] == [
            (number, one["function"]) for number, one in enumerate(made)
        ]
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_call_in_a_conversation_begins_with_the_special_token(mistral: Served) -> None:
    made = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    messages = [USER, {"role": "assistant", "tool_calls": [made]}]
    assert call(f"{mistral.url}/tokenize", {"messages": messages}).json["tokens"].count(MARKER_ID) == 1
