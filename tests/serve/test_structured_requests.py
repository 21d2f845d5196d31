"""Texts that obey what the request asks for, in this process: every form of it, whole and streamed."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
from http_calls import MODEL, call, events
from patience import PATIENCE_S
from served import Served

from moray.engine.structured import checker
from moray.engine.structured.checker import GrammarChecker
from moray.engine.structured.constraint import Structured
from moray.serve import grammar_compiler

USER = {"role": "user", "content": "Describe a city."}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
}


def chat(local: Served, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [USER], "temperature": 1, "max_tokens": 80} | fields
    reply = call(f"{local.url}/v1/chat/completions", body)
    assert reply.status == 200, reply.text
    return events(reply.text) if fields.get("stream") else reply.json


def complete(local: Served, **fields: Any) -> Any:
    body = {"model": MODEL, "prompt": "A city is", "temperature": 1, "max_tokens": 80} | fields
    reply = call(f"{local.url}/v1/completions", body)
    assert reply.status == 200, reply.text
    return events(reply.text) if fields.get("stream") else reply.json


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | more}


@pytest.mark.parametrize("strict", [None, True, False])
def test_json_of_a_schema(local: Served, strict: bool | None) -> None:
    answer = chat(local, n=6, seed=3, response_format=schema_format(PERSON, strict=strict, description="a person"))
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    validator = jsonschema_rs.validator_for(PERSON)
    assert all(validator.is_valid(json.loads(text)) for text in texts), texts
    assert len(set(texts)) > 1 and {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    same = complete(local, n=6, seed=3, structured_outputs={"json": json.dumps(PERSON)})
    assert all(validator.is_valid(json.loads(choice["text"])) for choice in same["choices"])


def test_the_order_of_properties_is_that_of_the_schema(local: Served) -> None:
    for names in (["b", "a", "c"], ["c", "b", "a"]):
        schema = {"type": "object", "properties": {n: {"type": "boolean"} for n in names}, "required": names}
        text = chat(local, response_format=schema_format(schema))["choices"][0]["message"]["content"]
        assert list(json.loads(text)) == names


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_any_object(local: Served, fields: dict[str, Any]) -> None:
    choices = chat(local, n=4, seed=1, **fields)["choices"]
    ended = [json.loads(one["message"]["content"]) for one in choices if one["finish_reason"] == "stop"]
    assert all(isinstance(value, dict) for value in ended)
    assert all(one["message"]["content"].startswith("{") for one in choices)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"\d{3}-[a-z]{2,5}"}, r"[0-9]{3}-[a-z]{2,5}"),
        ({"choice": ["yes", "no", "may be"]}, "yes|no|may be"),
        ({"grammar": 'start: "a" | "(" start ")"'}, r"\(*a\)*"),
        ({"grammar": 'root ::= "ab" [0-9]'}, "ab[0-9]"),
    ],
)
def test_other_kinds(local: Served, outputs: dict[str, Any], pattern: str) -> None:
    for texts in (
        [choice["message"]["content"] for choice in chat(local, n=4, structured_outputs=outputs)["choices"]],
        [choice["text"] for choice in complete(local, n=4, structured_outputs=outputs)["choices"]],
    ):
        assert all(re.fullmatch(pattern, text) for text in texts), texts


def test_what_asks_for_nothing(local: Served) -> None:
    free = chat(local, seed=5)["choices"]
    for fields in (
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "regex": None, "disable_fallback": True}},
        {"response_format": None, "structured_outputs": None},
    ):
        assert chat(local, seed=5, **fields)["choices"] == free


def test_streams_add_up_to_the_whole(local: Served) -> None:
    """Forced tokens come several at once: text, logprobs and usage count all of them."""
    fields = {"response_format": schema_format(PERSON), "seed": 7, "n": 2}
    whole = chat(local, logprobs=True, top_logprobs=1, **fields)
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = chat(local, logprobs=True, top_logprobs=1, **fields, **options)
    assert last["usage"] == whole["usage"] == chunks[-1]["usage"]
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        entries = [entry for one in own if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "stop"
    plain = chat(local, **fields)
    assert [one["message"] for one in plain["choices"]] == [one["message"] for one in whole["choices"]]
    assert plain["usage"] == whole["usage"]
    streamed = complete(local, structured_outputs={"json": PERSON}, seed=7, logprobs=1, stream=True)
    together = complete(local, structured_outputs={"json": PERSON}, seed=7, logprobs=1)["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == together["text"]
    offsets = [offset for chunk in streamed for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == together["logprobs"]["text_offset"]


def test_a_text_that_max_tokens_cuts(local: Served) -> None:
    (choice,) = chat(local, response_format=schema_format(PERSON), max_tokens=5)["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith('{"name"')


def test_a_constrained_text_is_all_answer(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markers in it are no markers of reasoning; a template's variable for thoughts is set to false."""
    args = local.endpoint.args.model_copy(update={"reasoning": {"start": "[", "end": "]"}})
    monkeypatch.setattr(local.endpoint, "args", args)
    message = chat(local, structured_outputs={"regex": r"\[a\]b"})["choices"][0]["message"]
    assert message["content"] == "[a]b" and "reasoning" not in message
    deltas = [one["choices"][0]["delta"] for one in chat(local, structured_outputs={"regex": r"\[a\]b"}, stream=True)]
    assert "".join(delta.get("content", "") for delta in deltas) == "[a]b"
    tokenizer = local.endpoint.tokenizer._tokenizer
    thinks = (
        "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %}[{% else %}!{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", thinks)
    assert chat(local, structured_outputs={"regex": "ab"})["choices"][0]["message"]["content"] == "ab"
    body = {"model": MODEL, "messages": [USER], "structured_outputs": {"regex": "ab"}}
    url = f"{local.url}/v1/chat/completions"
    asked = call(url, body | {"chat_template_kwargs": {"enable_thinking": True}})
    assert (asked.status, asked.error["param"]) == (400, "chat_template_kwargs.enable_thinking")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}[")
    begun = call(url, body)
    assert (begun.status, begun.error["param"]) == (400, "structured_outputs")
    assert begun.error["message"].endswith("its chat template begins each answer with thoughts")


def test_the_answer_of_a_model_with_channels_begins_in_the_prompt(
    local: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"structured_outputs": {"regex": "ab"}}
    before = chat(local, **fields)["usage"]["prompt_tokens"]
    args = local.endpoint.args.model_copy(update={"reasoning": "harmony"})
    monkeypatch.setattr(local.endpoint, "args", args)
    answer = chat(local, **fields)
    assert answer["choices"][0]["message"]["content"] == "ab"
    (added,) = local.endpoint.tokenizer.encode_texts(["<|channel|>final<|message|>"], add_special_tokens=False)
    assert answer["usage"]["prompt_tokens"] == before + len(added)


def test_a_slow_grammar_delays_nobody(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads are busy: free texts run, and grammars that are known; others are refused in time."""
    known = {"structured_outputs": {"choice": ["a", "b"]}}
    chat(local, **known)
    begun, may_end = threading.Semaphore(0), threading.Event()
    check = GrammarChecker.check

    def check_slowly(self: GrammarChecker, structured: Structured, cpu_limit_s: float) -> None:
        if "slow" in structured.text:
            begun.release()
            assert may_end.wait(PATIENCE_S)
        check(self, structured, cpu_limit_s)

    monkeypatch.setattr(GrammarChecker, "check", check_slowly)
    monkeypatch.setattr(grammar_compiler, "TIME_LIMIT_S", 1.0)
    body = {"model": MODEL, "messages": [USER], "max_tokens": 4}
    url = f"{local.url}/v1/chat/completions"
    with ThreadPoolExecutor(grammar_compiler.THREADS) as clients:
        slow = [
            clients.submit(call, url, body | {"structured_outputs": {"regex": f"slow{number}"}})
            for number in range(grammar_compiler.THREADS)
        ]
        try:
            for _ in slow:
                assert begun.acquire(timeout=PATIENCE_S)
            assert call(url, body).status == 200
            assert call(url, body | known).status == 200
            waiting = call(url, body | {"structured_outputs": {"regex": "new"}})
            assert (waiting.status, waiting.error["code"]) == (503, "unavailable") and "retry-after" in waiting.headers
            for reply in (one.result() for one in slow):
                assert (reply.status, reply.error["code"]) == (503, "unavailable")
                assert reply.error["message"].endswith("was not compiled within 1 s; try again, or make it simpler")
        finally:
            may_end.set()
    monkeypatch.setattr(local.endpoint._grammars, "_max_unfinished", 0)
    reply = call(url, body | known)
    assert (reply.status, reply.error["code"]) == (429, "too_many_grammars")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            {"grammar": "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(5000)) + 'r5000: "c"\n'},
            "is too large or too deeply nested to check; make it simpler",
        ),
        (
            {"json": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]}},
            "takes longer than 1 s to check; make it simpler",
        ),
    ],
)
def test_a_grammar_that_ends_its_process(
    local: Served, monkeypatch: pytest.MonkeyPatch, outputs: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(checker, "CPU_LIMIT_S", 1.0)
    for module, limit in ((checker, "PATIENCE_S"), (grammar_compiler, "TIME_LIMIT_S")):  # of a busy machine
        monkeypatch.setattr(module, limit, PATIENCE_S)
    body = {"model": MODEL, "messages": [USER], "max_tokens": 4, "structured_outputs": outputs}
    reply = call(f"{local.url}/v1/chat/completions", body)
    assert (reply.status, reply.error["code"]) == (400, "bad_grammar")
    assert reply.error["message"] == f"structured_outputs: {message}"
    assert chat(local, structured_outputs={"regex": "ab?"})["choices"][0]["message"]["content"] in ("a", "ab")
