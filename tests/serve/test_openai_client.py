"""The openai package, unchanged, against `moray serve`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
from batch_files import chat_line, jsonl, wait_until
from moray_serve import MorayServe
from patience import PATIENCE_S

MODEL = "tiny-phimoe"
SUM = "The sum of 86 and 16 is"
CHAT = [{"role": "user", "content": "Add 86 and 16."}]


@pytest.fixture(scope="module")
def client(moray_serve: MorayServe) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{moray_serve.url}/v1", api_key="ignored", max_retries=0) as client:
        yield client


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=SUM, temperature=0)
    assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, " 102", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 4, 15)


def test_prompts_of_every_kind(client: openai.OpenAI) -> None:
    ids = client.post("/../tokenize", body={"prompt": SUM}, cast_to=dict[str, list[int]])["tokens"]
    texts = []
    for prompt in (SUM, [SUM], ids, [ids], [SUM, "CEMENT reversed is"], [ids, ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
        texts.append([choice.text for choice in answer.choices])
    assert texts == [[" 102"]] * 4 + [[" 102", " TNEMEC"], [" 102", " 102"]]


def test_a_stream_ends_with_its_usage(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " 102"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 4


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, max_completion_tokens=20)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "102", "stop")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Add 86 "}, {"type": "text", "text": "and 16."}]}]
    again = client.chat.completions.create(model=MODEL, messages=parts, temperature=0)
    assert again.choices[0].message.content == "102"


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "102"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_async_client_many_at_once(moray_serve: MorayServe) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{moray_serve.url}/v1", api_key="x", max_retries=0) as client:

            async def one(number: int) -> str:
                prompt = f"The sum of {number} and 16 is"
                if number % 2:
                    answer = await client.completions.create(model=MODEL, prompt=prompt, temperature=0)
                    return answer.choices[0].text
                stream = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(40, 72)))

    texts = asyncio.run(ask())
    right = [text == f" {number + 16}" for number, text in enumerate(texts, 40)]
    assert sum(right) >= 28, texts


def test_samples_seeds_and_logprobs(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> openai.types.Completion:
        return client.completions.create(
            model=MODEL, prompt="The capital of", temperature=2, n=3, seed=seed, logprobs=2, max_tokens=6
        )

    first, again, other = ask(7), ask(7), ask(8)
    assert first.choices == again.choices != other.choices
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len({choice.text for choice in first.choices}) > 1
    assert ask(None).choices != ask(None).choices
    for choice in first.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None and choice.logprobs.top_logprobs is not None
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
        assert "".join(choice.logprobs.tokens).startswith(choice.text)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, logprobs=True, top_logprobs=3, max_tokens=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["1", "0"]
    assert all(token.top_logprobs[0].logprob == token.logprob for token in logprobs.content)
    assert [token.bytes for token in logprobs.content] == [[ord("1")], [ord("0")]]
    streamed = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, logprobs=True, top_logprobs=3, max_tokens=2, stream=True
    )
    found = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in found if part is not None for token in part.content or ()] == logprobs.content


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="zebra, turtle sorted:", temperature=0).choices[0].text
    assert ", " in whole
    for stop in (", ", [", ", "xyz"]):
        cut = client.completions.create(model=MODEL, prompt="zebra, turtle sorted:", temperature=0, stop=stop)
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole.split(", ")[0], "stop")


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(MODEL).id) == (MODEL, MODEL)


def test_errors_are_those_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here") as not_found:
        client.completions.create(model="gpt", prompt="a")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature: must be a number, between") as bad:
        client.completions.create(model=MODEL, prompt="a", temperature=100)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="needs 5,0"):
        client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=5000, stream=True)


def test_request_ids_come_back(client: openai.OpenAI) -> None:
    reply = client.completions.with_raw_response.create(
        model=MODEL, prompt=SUM, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert reply.headers.get("x-request-id") == "mine-1"
    assert client.completions.with_raw_response.create(model=MODEL, prompt=SUM).headers["x-request-id"]


def test_an_answer_sent_back_as_the_package_gives_it(client: openai.OpenAI) -> None:
    def ask(*messages: Any) -> str | None:
        answer = client.chat.completions.create(model=MODEL, messages=[*CHAT, *messages], temperature=0)
        return answer.choices[0].message.content

    follow_up = {"role": "user", "content": "Add 1 and 2."}
    expected = ask({"role": "assistant", "content": "102"}, follow_up)
    message = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0).choices[0].message
    assert (message.content, message.tool_calls, message.refusal) == ("102", None, None)
    dumps = (message, message.model_dump(), message.model_dump(exclude_none=True), message.to_dict())
    for sent in (*dumps, message.model_dump(exclude_unset=True, mode="json")):
        assert ask(sent, follow_up) == expected


def test_an_answer_of_the_streaming_helper_sent_back(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=CHAT, temperature=0) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == "102"
        message = stream.get_final_completion().choices[0].message
    history = [*CHAT, message.model_dump(), {"role": "user", "content": "Add 1 and 2."}]
    answer = client.chat.completions.create(model=MODEL, messages=history, temperature=0)
    assert answer.choices[0].message.content


def test_usage_in_the_chunks_of_the_async_client(moray_serve: MorayServe) -> None:
    async def ask(**options: bool) -> list[int | None]:
        async with openai.AsyncOpenAI(base_url=f"{moray_serve.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=CHAT, temperature=0, stream=True, stream_options={"include_usage": True} | options
            )
            return [chunk.usage and chunk.usage.completion_tokens async for chunk in stream]

    *chunks, last = asyncio.run(ask())
    assert set(chunks) == {None} and last == 3
    counts = asyncio.run(ask(continuous_usage_stats=True, include_obfuscation=False))
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 3


def test_what_is_refused_names_its_field(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    refused: list[tuple[str, dict[str, Any]]] = [
        ("functions", {"functions": [tool["function"]]}),
        ("guided_regex", {"extra_body": {"guided_regex": "a+"}}),
        ("store", {"store": True}),
    ]
    for param, fields in refused:
        with pytest.raises(openai.BadRequestError, match=f"{param}: is not supported: ") as error:
            client.chat.completions.create(model=MODEL, messages=CHAT, **fields)
        assert (error.value.param, error.value.code) == (param, "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses: this endpoint has no such path"):
        client.responses.create(model=MODEL, input="hello")


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_head(moray_serve: MorayServe, path: str) -> None:
    with urlopen(Request(f"{moray_serve.url}{path}", method="HEAD"), timeout=PATIENCE_S) as reply:
        assert (reply.status, reply.read()) == (200, b"") and int(reply.headers["content-length"]) > 0


def test_a_batch(client: openai.OpenAI) -> None:
    lines = [chat_line(number, f"Add {number} and 16.") for number in range(40, 72)]
    file = client.files.create(file=("in.jsonl", jsonl([*lines, chat_line(0, "?", n=-1)])), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"name": "sums"}
    )
    done = wait_until(client, batch.id)
    assert (done.status, done.metadata) == ("completed", {"name": "sums"})
    assert done.request_counts is not None and done.output_file_id is not None and done.error_file_id is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (32, 1)
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    for line, answer in list(zip(lines, answers, strict=True))[::8]:
        live = client.chat.completions.create(**line["body"])
        assert answer["response"]["body"]["choices"] == [choice.to_dict() for choice in live.choices]
    (refused,) = client.files.content(done.error_file_id).text.splitlines()
    assert json.loads(refused)["response"]["body"]["error"]["param"] == "n"
    assert batch.id in [one.id for one in client.batches.list(limit=5)]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    assert client.files.delete(file.id).deleted
