"""Tests of AsyncEngine on the real engine: streams, aborts, failures, shutdown."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from held_steps import HeldSteps, wait_for
from made_jobs import TINY
from patience import PATIENCE_S

from moray.engine.async_engine import AsyncEngine, OutputStream
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import EngineError, RequestError, UserError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, Request
from moray.engine.structured.constraint import Structured

PROMPT = [100, 7, 30]


@pytest.fixture(scope="module")
def loaded() -> Engine:
    return Engine(str(TINY), EngineConfig(max_num_seqs=4, max_model_len=512, special_tokens="keep"))


@pytest.fixture
def run(loaded: Engine) -> Iterator[Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any]]:
    """Run a test's coroutine function on an AsyncEngine, and check that the engine is empty at the end."""

    def begin(test: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
        async def body() -> Any:
            engine = await AsyncEngine.start(lambda: loaded)
            try:
                return await asyncio.wait_for(test(engine), PATIENCE_S)
            finally:
                engine.close()
                await asyncio.wait_for(engine.drain(), PATIENCE_S)

        return asyncio.run(body())

    yield begin
    for request_id in list(loaded._samples):
        loaded.abort(request_id)


def request(request_id: str, **params: Any) -> Request:
    return Request(request_id, PROMPT, SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | params), stream_key=5)


async def finish(stream: OutputStream) -> dict[tuple[str, int], Completion]:
    done = {}
    with stream:
        async for outputs in stream:
            done |= {(o.request_id, o.sample): o.completion for o in outputs if o.completion is not None}
    return done


def test_a_stop_string_may_name_special_tokens_that_are_kept(run: Any, loaded: Engine) -> None:
    assert loaded.tokenizer is not None
    (end,) = loaded.tokenizer.encode_texts(["<|end|>"], add_special_tokens=False)[0]

    async def test(engine: AsyncEngine) -> Any:
        return await finish(engine.submit([request("r", logit_bias={end: 100}, stop=("<|end|><|end|>",))]))

    done = run(test)["r", 0]
    assert (done.finish_reason, done.token_ids, done.text_length) == ("stop", (end, end), 0)


def test_streams_give_what_the_engine_gives_alone(run: Any, loaded: Engine) -> None:
    async def test(engine: AsyncEngine) -> Any:
        streams = [engine.submit([request(f"{i}.{j}", temperature=1.0, n=2) for j in range(3)]) for i in range(4)]
        return await asyncio.gather(*map(finish, streams))

    found = run(test)
    loaded.add(request("alone", temperature=1.0, n=2))
    alone = {}
    while loaded.has_work:
        alone |= {o.sample: o.completion.token_ids for o in loaded.step() if o.completion is not None}
    for i, done in enumerate(found):
        assert done.keys() == {(f"{i}.{j}", sample) for j in range(3) for sample in range(2)}
        assert all(completion.token_ids == alone[sample] for (_, sample), completion in done.items())


def test_a_grammar_is_compiled_once_by_who_asks_and_forced_tokens_come_together(
    run: Any, loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    compile_one = loaded._grammars._compile
    monkeypatch.setattr(
        loaded._grammars,
        "_compile",
        lambda structured: (threads.append(threading.current_thread().name), compile_one(structured))[1],
    )
    text = "The answer is: yes"
    structured = Structured.from_value("choice", [text])

    async def obeying(engine: AsyncEngine) -> list[Output]:
        await asyncio.to_thread(engine.compile, structured)
        stream = engine.submit([request("r", structured=structured, ignore_eos=False, max_tokens=60)])
        assert engine.queued_tokens == len(PROMPT) + 60
        with stream:
            return [output async for outputs in stream for output in outputs]

    outputs = run(obeying)
    assert len(threads) == 1 and threads[0] not in ("engine", threading.current_thread().name)
    assert loaded.tokenizer is not None
    new_token_ids = [token_id for output in outputs for token_id in output.new_token_ids]
    assert loaded.tokenizer.decode(new_token_ids) == text and len(outputs) < len(new_token_ids)
    assert outputs[-1].completion is not None and outputs[-1].completion.finish_reason == "stop"

    async def refused(engine: AsyncEngine) -> None:
        await engine.compile(Structured.from_value("regex", "a(b"))

    with pytest.raises(RequestError, match="unclosed group"):
        run(refused)


def test_tokens_come_as_they_are_made(run: Any) -> None:
    async def test(engine: AsyncEngine) -> Any:
        with engine.submit([request("a", logprobs=0)]) as stream:
            return [outputs async for outputs in stream]

    outputs = [output for outputs in run(test) for output in outputs]
    completion = outputs[-1].completion
    assert [output.completion for output in outputs[:-1]] == [None] * 5
    assert tuple(token for output in outputs for token in output.new_token_ids) == completion.token_ids
    assert tuple(entry for output in outputs for entry in output.new_logprobs) == completion.logprobs


def test_a_stream_that_is_left_is_aborted_within_a_step(run: Any, loaded: Engine) -> None:
    async def test(engine: AsyncEngine) -> None:
        free, before = engine.stats().free_blocks, loaded.metrics.steps
        with HeldSteps(loaded) as steps:
            with engine.submit([request("a", max_tokens=500, n=2), request("b", max_tokens=500)]) as stream:
                await asyncio.to_thread(steps.wait_until_held)
                await asyncio.to_thread(steps.run)
                await anext(stream)
                assert engine.stats().free_blocks < free and engine.num_seqs == 3
            assert (engine.num_seqs, engine.queued_tokens) == (0, 0)
            steps.allow()
            await asyncio.to_thread(wait_for, lambda: not loaded.has_work)
        assert loaded.metrics.steps == before + 2, "the step that ran when it was left is the last one"
        assert engine.stats().free_blocks == free

    run(test)


def test_a_cancelled_task_aborts_too(run: Any, loaded: Engine) -> None:
    async def test(engine: AsyncEngine) -> None:
        with HeldSteps(loaded) as steps:
            tasks = [asyncio.create_task(finish(engine.submit([request(str(i), max_tokens=500)]))) for i in range(8)]
            steps.allow()
            await asyncio.to_thread(wait_for, lambda: len(loaded._samples) == 8)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.wait(tasks[1:])
            steps.allow()
            await asyncio.to_thread(wait_for, lambda: list(loaded._samples) == ["0"])
            assert engine.num_seqs == 1
            tasks[0].cancel()

    run(test)


def test_a_refused_request_takes_its_stream_with_it_and_no_other(run: Any, loaded: Engine) -> None:
    async def test(engine: AsyncEngine) -> Any:
        bad = Request("bad", [10**6], SamplingParams())
        other = asyncio.create_task(finish(engine.submit([request("other")])))
        with pytest.raises(RequestError, match="token id 1000000"):
            await finish(engine.submit([request("good", max_tokens=400), bad, request("after")]))
        return await other

    assert run(test)[("other", 0)].finish_reason == "length"
    assert not loaded.has_work


def test_an_exception_in_the_engine_fails_all_streams_and_those_to_come(
    run: Any, loaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("out of memory")

    async def test(engine: AsyncEngine) -> None:
        monkeypatch.setattr(loaded, "step", broken)
        results = await asyncio.gather(
            *(finish(engine.submit([request(str(i))])) for i in range(3)), return_exceptions=True
        )
        assert [str(result) for result in results] == ["the engine failed"] * 3
        assert isinstance(engine.failure, EngineError) and not engine.is_open
        with pytest.raises(EngineError, match="the engine failed"):
            engine.submit([request("late")])
        assert engine.queued_tokens == 0

    run(test)


def test_drain_finishes_what_is_there_and_takes_nothing_new(run: Any) -> None:
    async def test(engine: AsyncEngine) -> Any:
        running = asyncio.create_task(finish(engine.submit([request("a", max_tokens=50)])))
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        assert not engine.is_open
        with pytest.raises(EngineError, match="shutting down"):
            engine.submit([request("late")])
        await draining
        return await running

    assert len(run(test)[("a", 0)].token_ids) == 50


def test_queued_tokens_are_those_to_come(run: Any, loaded: Engine) -> None:
    async def test(engine: AsyncEngine) -> None:
        with HeldSteps(loaded) as steps, engine.submit([request("a", max_tokens=100, n=2)]) as stream:
            assert (engine.num_seqs, engine.queued_tokens) == (2, 206)
            for tokens_left in (99, 98, 97):
                steps.allow()
                await anext(stream)
                assert (engine.num_seqs, engine.queued_tokens) == (2, 2 * tokens_left)

    run(test)


def test_an_engine_that_cannot_be_made() -> None:
    def make_engine() -> Engine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        asyncio.run(AsyncEngine.start(make_engine))
