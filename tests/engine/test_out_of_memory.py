"""Steps that run out of memory twice: the limits are lowered, and every token is as without it."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import EXAMPLES

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import EngineError
from moray.engine.models.sequential import SequentialForCausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.engine.sampling.sampler import Sampler
from moray.engine.structured.constraint import Structured

CONFIG = EngineConfig(device="cpu", max_num_seqs=16, max_num_batched_tokens=64, kv_cache_memory=1 << 20)


def requests() -> list[Request]:
    def prompt(i: int) -> list[int]:
        return [3 + (37 * i + 5 * n) % 150 for n in range(5 + 7 * i)]

    sampled = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.9, logprobs=2, presence_penalty=0.5, n=2)
    plain = SamplingParams(max_tokens=6, ignore_eos=True, prompt_logprobs=1)
    nothing = SamplingParams(max_tokens=0, prompt_logprobs=1)
    kinds = [sampled, plain, nothing]
    return [Request(str(i), prompt(i), kinds[i % 3], stream_key=i) for i in range(9)]


def run(engine: Engine, given: list[Request]) -> dict[tuple[str, int], Completion]:
    for request in given:
        engine.add(request)
    done = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id, output.sample] = output.completion
    assert engine.stats().free_blocks == engine.limits.num_blocks
    engine._scheduler.block_manager.check([])
    return done


@contextmanager
def memory_for(monkeypatch: pytest.MonkeyPatch, tokens: int = 1 << 20, samples: int = 1 << 20) -> Iterator[None]:
    """Let the allocator fail in steps of more tokens, or of more samples, after the work has been done."""
    forward, launch = SequentialForCausalLM.forward, Sampler.launch

    def fail_if(too_large: bool) -> None:
        if too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def limited_forward(self: SequentialForCausalLM, inputs: Any) -> Any:
        result = forward(self, inputs)
        fail_if(len(inputs.input_ids) > tokens)
        return result

    def limited_launch(self: Sampler, logits: Any, of: Any) -> Any:
        fail_if(len(of) > samples)
        return launch(self, logits, of)

    with monkeypatch.context() as patch:
        patch.setattr(SequentialForCausalLM, "forward", limited_forward)
        patch.setattr(Sampler, "launch", limited_launch)
        yield


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
@pytest.mark.parametrize(
    ("room", "limits", "times"),
    [({"tokens": 20}, (16, 16), 2), ({"tokens": 3}, (2, 2), 5), ({"samples": 3}, (3, 64), 1)],
)
def test_a_lowered_limit_loses_no_token(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: dict[str, int],
    limits: tuple[int, int],
    times: int,
    is_async: bool,
) -> None:
    config = replace(CONFIG, async_scheduling=is_async)
    want = run(Engine(str(checkpoints["phimoe"]), config), requests())
    engine = Engine(str(checkpoints["phimoe"]), config)
    with memory_for(monkeypatch, **room), caplog.at_level(logging.WARNING):
        assert run(engine, requests()) == want
    stats = engine.stats()
    assert (stats.max_num_seqs, stats.max_num_batched_tokens) == limits
    assert (engine.limits.max_num_seqs, engine.limits.max_num_batched_tokens) == limits
    assert stats.totals.lowered_limits == times
    load = engine.expert_tokens().sum(dim=1)
    assert (load == 2 * engine.metrics.computed_tokens).all(), "a step that failed does not count"
    lowered = [record.getMessage() for record in caplog.records if "lowers engine." in record.getMessage()]
    assert len(lowered) == times and "Tried to allocate 2 GiB" in lowered[0] and "more" not in lowered[0]


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
def test_a_sample_that_obeys_a_grammar_goes_on_where_it_was(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest token is computed again; the grammar has followed it once."""
    config, folder = replace(CONFIG, async_scheduling=is_async, max_model_len=256), str(EXAMPLES / "tiny-phimoe")
    params = SamplingParams(max_tokens=12, temperature=0.9, structured=Structured("regex", "[ab]{3}(cdefgh|ef)+"))
    given = [Request(str(i), [5 + i, 6, 7], params, stream_key=i) for i in range(4)]
    want = run(Engine(folder, config), given)
    engine = Engine(folder, config)
    with memory_for(monkeypatch, samples=1):
        assert run(engine, given) == want
    assert engine.limits.max_num_seqs == 1


def test_prompt_logprobs_go_on_where_they_were(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of the step are there when the others run out of memory, twice."""
    config = replace(CONFIG, max_num_batched_tokens=200)
    prompt = [3 + 7 * n % 150 for n in range(180)]
    given = [Request("r", prompt, SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=2))]
    want = run(Engine(str(checkpoints["phimoe"]), config), given)
    engine = Engine(str(checkpoints["phimoe"]), config)
    launch, calls = Sampler.launch_logprobs, itertools.count()

    def limited(self: Sampler, *arguments: Any) -> Any:
        if next(calls) in (1, 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(self, *arguments)

    monkeypatch.setattr(Sampler, "launch_logprobs", limited)
    assert run(engine, given) == want
    assert engine.metrics.lowered_limits == 1 and next(calls) > 3
    load = engine.expert_tokens().sum(dim=1)
    assert (load == 2 * engine.metrics.computed_tokens).all(), "a step whose logprobs failed does not count"


def test_one_token_that_does_not_fit_is_an_error(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(str(checkpoints["phimoe"]), CONFIG)
    with memory_for(monkeypatch, tokens=0), pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        run(engine, requests())
    assert engine.limits.max_num_batched_tokens == 1


@pytest.mark.slow
def test_with_ranks_the_error_says_what_to_lower(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(str(checkpoints["phimoe"]), replace(CONFIG, tensor_parallel=2))
    message = r"2 GiB; the step had 64 tokens .* lower engine.kv_cache_memory, or engine.max_num_batched_tokens \(64\)"
    with memory_for(monkeypatch, tokens=20), pytest.raises(EngineError, match=message):
        run(engine, requests())


def allocate_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space


def find_none_in_a_kernel() -> None:
    raise MemoryError("a kernel found no memory")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (allocate_too_much, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152921504606846976"),
        (find_none_in_a_kernel, "a kernel found no memory"),
    ],
)
def test_a_failed_allocation_on_a_cpu_lowers_the_limits(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[], None],
    message: str,
) -> None:
    """torch raises no OutOfMemoryError there."""
    want = run(Engine(str(checkpoints["phimoe"]), CONFIG), requests())
    engine = Engine(str(checkpoints["phimoe"]), CONFIG)
    forward = SequentialForCausalLM.forward

    def limited(self: SequentialForCausalLM, inputs: Any) -> Any:
        if len(inputs.input_ids) > 20:
            fail()
        return forward(self, inputs)

    monkeypatch.setattr(SequentialForCausalLM, "forward", limited)
    with caplog.at_level(logging.WARNING):
        assert run(engine, requests()) == want
    assert engine.limits.max_num_batched_tokens == 16 and engine.metrics.lowered_limits == 2
    (first, *_) = [record.getMessage() for record in caplog.records if "lowers engine." in record.getMessage()]
    assert first.startswith(message)


def test_other_errors_of_a_step_are_no_lack_of_memory(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(str(checkpoints["phimoe"]), CONFIG)

    def broken(*_: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(SequentialForCausalLM, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        run(engine, requests())
    assert not isinstance(caught.value, torch.OutOfMemoryError) and engine.metrics.lowered_limits == 0
