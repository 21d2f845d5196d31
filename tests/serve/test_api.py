"""The endpoint's answers, in this process: the engine's own tokens, in every format."""

import dataclasses
import threading
from typing import Any

import pytest
from dashboards import emitted, in_alerts, in_dashboard
from http_calls import MODEL, Reply, call, events
from patience import PATIENCE_S
from served import Served, served

from moray.engine.metrics import Metrics, prometheus_name

SUM = "The sum of 86 and 16 is"


def complete(local: Served, **fields: Any) -> Any:
    reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": SUM, "temperature": 0} | fields)
    assert reply.status == 200, reply.text
    return events(reply.text) if fields.get("stream") else reply.json


@pytest.mark.parametrize("prompt", [SUM, "h\u00e9llo \U0001f642 caf\u00e9"])
def test_echo_and_logprobs(local: Served, prompt: str) -> None:
    answer = complete(local, prompt=prompt, echo=True, logprobs=1, max_tokens=3, ignore_eos=True)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    num_tokens = answer["usage"]["prompt_tokens"] + 3
    assert {len(column) for column in logprobs.values()} == {num_tokens}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    for token, logprob, top in list(rows)[1:]:
        assert logprob <= max(top.values()) and token in top
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])
    plain = complete(local, prompt=prompt, logprobs=1, max_tokens=3, ignore_eos=True)["choices"][0]["logprobs"]
    assert plain["token_logprobs"] == logprobs["token_logprobs"][-3:]


def test_echo_alone_scores_the_prompt(local: Served) -> None:
    with_one = complete(local, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    alone = complete(local, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert (alone["text"], alone["finish_reason"]) == (SUM, "length")
    assert alone["logprobs"]["token_logprobs"] == with_one["logprobs"]["token_logprobs"][:-1]
    (event, end) = complete(local, echo=True, max_tokens=0, stream=True)
    assert [e["choices"][0]["text"] for e in (event, end)] == [SUM, ""]


def test_streams_add_up_to_the_whole(local: Served) -> None:
    for fields in (
        {"n": 3, "temperature": 2, "seed": 3, "max_tokens": 40},
        {"prompt": [SUM, "zebra, turtle sorted:"], "echo": True},
        {"prompt": "zebra, turtle sorted:", "stop": ["tle, ze"], "logprobs": 2},
        {"temperature": 5, "seed": 1, "max_tokens": 200, "ignore_eos": True},
    ):
        whole = complete(local, **fields)["choices"]
        texts, reasons, tokens = [""] * len(whole), [""] * len(whole), [[] for _ in whole]
        for event in complete(local, stream=True, **fields):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                reasons[choice["index"]] = choice["finish_reason"]
                tokens[choice["index"]] += (choice["logprobs"] or {}).get("token_logprobs", [])
        assert texts == [choice["text"] for choice in whole]
        assert reasons == [choice["finish_reason"] for choice in whole]
        if "logprobs" in fields:
            assert tokens == [choice["logprobs"]["token_logprobs"] for choice in whole]


def test_the_first_token_does_not_wait_for_the_second(local: Served) -> None:
    stream = complete(local, stream=True, max_tokens=5, ignore_eos=True)
    assert [len(event["choices"]) for event in stream] == [1] * 5


def test_a_chat_may_fill_the_context_or_the_cap() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "temperature": 0}
    with served(max_model_len=64) as local:
        answer = call(f"{local.url}/v1/chat/completions", body).json
        assert (answer["usage"]["total_tokens"], answer["choices"][0]["finish_reason"]) == (64, "length")
    with served(max_tokens_cap=5) as local:
        answer = call(f"{local.url}/v1/chat/completions", body).json
        assert answer["usage"]["completion_tokens"] == 5
        refused = call(f"{local.url}/v1/chat/completions", body | {"max_tokens": 6})
        assert (refused.status, refused.error["message"]) == (400, "max_tokens: is 6; this endpoint gives at most 5")


def test_a_developer_is_the_system(local: Served) -> None:
    def tokens(role: str) -> Any:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "hi"}]
        return call(f"{local.url}/tokenize", {"messages": messages}).json["tokens"]

    assert tokens("developer") == tokens("system")


def test_tokenize_and_back(local: Served) -> None:
    reply = call(f"{local.url}/tokenize", {"model": MODEL, "prompt": SUM}).json
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 2048) == (11, 2048)
    assert call(f"{local.url}/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": SUM}
    assert call(f"{local.url}/detokenize", {"tokens": [10**6]}).error["code"] == "bad_token_id"
    assert call(f"{local.url}/tokenize", {}).status == 400


def test_health_and_metrics(local: Served) -> None:
    assert call(f"{local.url}/health").json == {"status": "ok"}
    assert call(f"{local.url}/ready").json == {"status": "ready"}
    complete(local)
    lines = dict(line.rsplit(" ", 1) for line in call(f"{local.url}/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["moray_generated_tokens_total"]) > 0 and float(lines["moray_seqs"]) == 0
    assert float(lines['moray_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines["moray_first_token_seconds_count"]) >= 1


def test_dashboard_and_alerts_name_what_is_emitted(local: Served) -> None:
    complete(local)
    there = emitted(call(f"{local.url}/metrics").text)
    assert in_dashboard("moray.json") - there == set()
    assert {name for name in in_alerts() if name.startswith("moray_")} - there == set()
    assert {f"{prometheus_name(field.name)}_total" for field in dataclasses.fields(Metrics)} <= in_dashboard(
        "moray.json"
    )


def test_an_engine_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA out of memory")

    with served() as local:
        monkeypatch.setattr(local.engine, "step", broken)
        for _ in range(2):
            reply = call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": SUM})
            assert (reply.status, reply.error["message"]) == (503, "the engine failed; try again")
            assert reply.headers["retry-after"] == "5"
        assert (call(f"{local.url}/health").status, call(f"{local.url}/ready").status) == (503, 503)


def test_a_long_prompt_is_tokenized_beside_what_else_runs(local: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    encode = local.endpoint.tokenizer.encode_prompt

    def encode_slowly(text: str) -> list[int]:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return encode(text)

    monkeypatch.setattr(local.endpoint.tokenizer, "encode_prompt", encode_slowly)
    replies: list[Reply] = []
    body = {"model": MODEL, "prompt": "Add " * 5000}
    client = threading.Thread(target=lambda: replies.append(call(f"{local.url}/v1/completions", body)))
    client.start()
    assert begun.wait(PATIENCE_S)
    assert call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5], "max_tokens": 2}).status == 200
    assert not replies
    may_end.set()
    client.join(60)
    assert (replies[0].status, replies[0].error["code"]) == (400, "context_length_exceeded")
