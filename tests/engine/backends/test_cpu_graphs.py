"""Tests of decodes that are replayed from graphs: they give the bits of steps that run kernel by kernel."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import FAMILIES, FIRST_FAMILIES

from moray.engine.backends.cpu.step_graphs import CAPTURE_AFTER, MAX_SEQS, CpuGraphs
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.moe import Experts
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request

NUM_TOKENS = 2 * CAPTURE_AFTER + 4
BULK = 1


def run(engine: Engine, num_requests: int, num_tokens: int = NUM_TOKENS, priority: int = 0) -> list[Completion]:
    """Return the completions of requests, the last of which ends a few tokens after the others."""
    for i in range(num_requests):
        more = CAPTURE_AFTER + 2 if i == num_requests - 1 else 0
        params = SamplingParams(max_tokens=num_tokens + more, ignore_eos=True, temperature=1.0, logprobs=2)
        prompt = torch.randint(3, 160, (3 + 7 * i,), generator=torch.Generator().manual_seed(i)).tolist()
        engine.add(Request(str(i), prompt, params, stream_key=i, priority=priority))
    done: dict[str, Completion] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id] = output.completion
    return [done[str(i)] for i in range(num_requests)]


def graphs_of(engine: Engine) -> CpuGraphs:
    graphs = engine.runner._graphs
    assert isinstance(graphs, CpuGraphs)
    return graphs


def compare(folder: Path, config: EngineConfig, num_requests: int) -> CpuGraphs:
    """Check that an engine with graphs answers as one without; return its graphs."""
    plain = Engine(str(folder), replace(config, cuda_graphs=False))
    assert plain.runner._graphs is None
    engine = Engine(str(folder), config)
    for _ in range(2):
        assert run(engine, num_requests) == run(plain, num_requests)
        assert torch.equal(engine.expert_tokens(), plain.expert_tokens())
    return graphs_of(engine)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_replay_has_the_bits_of_a_step(checkpoints: dict[str, Path], architecture: str) -> None:
    graphs = compare(checkpoints[architecture], EngineConfig(dtype="bfloat16", num_threads=2), 3)
    assert {n for n, captured in graphs._graphs.items() if captured is not None} == {1, 3}


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "fp8"}, {"async_scheduling": True}])
@pytest.mark.parametrize("architecture", FIRST_FAMILIES[:1])
def test_formats_and_steps_ahead(checkpoints: dict[str, Path], architecture: str, options: dict[str, str]) -> None:
    graphs = compare(checkpoints[architecture], EngineConfig(dtype="bfloat16", **options), 2)  # type: ignore[arg-type]
    assert {n for n, captured in graphs._graphs.items() if captured is not None} == {1, 2}


def test_larger_steps_run_kernel_by_kernel(checkpoints: dict[str, Path]) -> None:
    graphs = compare(checkpoints["mixtral"], EngineConfig(dtype="bfloat16", max_num_seqs=32), MAX_SEQS + 1)
    assert set(graphs._graphs) == {1}


def test_another_number_of_threads_captures_again(checkpoints: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    engine = Engine(str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16", num_threads=2))
    want = run(engine, 1)
    first = graphs_of(engine)._graphs[1]
    try:
        torch.set_num_threads(1)
        assert run(engine, 1) == want
        assert graphs_of(engine)._graphs[1] is not first
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("from_the_start", [True, False])
def test_what_cannot_be_captured_runs_as_it_is(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    from_the_start: bool,
) -> None:
    """A layer reads a number on the host: the steps go on kernel by kernel, and count each expert once."""
    folder, config, forward = str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16"), Experts.forward
    plain = Engine(folder, config)
    want = run(plain, 1)

    def read_first(self: Experts, x: torch.Tensor, *args: object) -> object:
        assert not x[0, 0].isnan().item()
        return forward(self, x, *args)  # type: ignore[arg-type]

    engine = None if from_the_start else Engine(folder, config)
    monkeypatch.setattr(Experts, "forward", read_first)
    with caplog.at_level(logging.INFO, logger="moray"):
        engine = engine or Engine(folder, config)
        assert run(engine, 1) == want
    assert torch.equal(engine.expert_tokens(), plain.expert_tokens())
    assert engine.runner._graphs is None if from_the_start else graphs_of(engine)._graphs == {1: None}
    assert caplog.text.count("No graph for decodes of 1 at once") == 1


def test_a_replay_can_be_interrupted(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before the next layer, and is run again; the tokens of experts count once."""
    folder, config = str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16")
    want_engine, engine = Engine(folder, config), Engine(folder, config)
    want = run(want_engine, 1, 20, BULK)
    assert engine._interrupter is not None
    check, calls, replays = engine._interrupter._check, 0, 0

    def somebody_comes() -> None:
        nonlocal calls, replays
        calls += 1
        if graphs_of(engine)._graphs and calls % 5 == 0:
            replays += 1
            engine.interrupt_step(0)
        check()

    monkeypatch.setattr(engine._interrupter, "_check", somebody_comes)
    assert run(engine, 1, 20, BULK) == want
    assert replays > 3
    assert torch.equal(engine.expert_tokens(), want_engine.expert_tokens())
