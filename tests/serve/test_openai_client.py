"""The openai package, unchanged, against `moray serve`."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from moray_serve import MorayServe

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
