"""A request without HTTP, as the lines of batches are, gets the answer that the same request gets live."""

import asyncio
from typing import Any

import pytest
from http_calls import MODEL, call
from served import Served

from moray.serve.endpoint import Caller
from moray.serve.openai.requests import answer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUM = {"model": MODEL, "messages": [{"role": "user", "content": "Add 86 and 16."}]}
TEXT = {"model": MODEL, "prompt": "The capital of"}
LINE = Caller(None, "batch_1 7")


def ask(local: Served, url: str, body: dict[str, Any], caller: Caller = LINE) -> tuple[int, dict[str, Any]]:
    made = answer(local.endpoint, url, body, caller)
    return asyncio.run_coroutine_threadsafe(made, local.loop).result()


def without_id(value: dict[str, Any]) -> dict[str, Any]:
    return {name: field for name, field in value.items() if name not in ("id", "created")}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, SUM | {"temperature": 0}),
        (CHAT, SUM | {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
        (CHAT, SUM | {"seed": 5, "n": 3, "temperature": 2, "max_tokens": 5}),
        (COMPLETIONS, TEXT | {"temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 4}),
        (COMPLETIONS, TEXT | {"seed": 9, "temperature": 2, "prompt": ["a", "b"], "n": 2}),
        (COMPLETIONS, TEXT | {"seed": 9, "stop": ["e"], "top_k": 5, "service_tier": "flex"}),
    ],
)
def test_the_answer_of_the_route(local: Served, url: str, body: dict[str, Any]) -> None:
    status, found = ask(local, url, body)
    assert status == 200 and without_id(found) == without_id(call(local.url + url, body).json)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, SUM | {"model": "gpt"}),
        (CHAT, SUM | {"temperature": "hot"}),
        (CHAT, SUM | {"tools": [1]}),
        (CHAT, SUM | {"max_tokens": 5_000_000}),
        (CHAT, {"model": MODEL}),
        (COMPLETIONS, TEXT | {"n": 0}),
    ],
)
def test_the_error_of_the_route(local: Served, url: str, body: dict[str, Any]) -> None:
    live = call(local.url + url, body)
    assert ask(local, url, body) == (live.status, live.json) and live.status >= 400


def test_a_stream_is_refused(local: Served) -> None:
    status, body = ask(local, CHAT, SUM | {"stream": True})
    assert (status, body["error"]["param"]) == (400, "stream")


def test_samples_without_a_seed_follow_from_the_line(local: Served) -> None:
    body = TEXT | {"temperature": 3, "max_tokens": 12}
    texts = [ask(local, COMPLETIONS, body, Caller(None, seed))[1]["choices"] for seed in ("1", "1", "2", None)]
    assert texts[0] == texts[1] and len({str(one) for one in texts[1:]}) == 3


def test_no_limit_of_a_key_holds_for_a_line(local: Served) -> None:
    admission = local.endpoint.admission
    held = admission.admit("other", admission._max_samples)
    with held:
        assert call(local.url + COMPLETIONS, TEXT).status == 429
        assert ask(local, COMPLETIONS, TEXT)[0] == 200
