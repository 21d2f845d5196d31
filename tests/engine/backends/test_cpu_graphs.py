"""Tests of decodes that are replayed from graphs: they give the bits of steps that run kernel by kernel."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import FAMILIES, FIRST_FAMILIES

from moray.engine.backends.cpu.step_graphs import CAPTURE_AFTER, MAX_SEQS, NUM_CHECKS, CpuGraphs
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.moe import Experts
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.kernels.cpu.launch_graph import GraphMemory

NUM_STEPS = CAPTURE_AFTER + 1 + NUM_CHECKS + 3  # until a graph replays alone, and some that it does
NUM_TOKENS = 2 * NUM_STEPS
BULK = 1


def run(engine: Engine, num_requests: int, num_tokens: int = NUM_TOKENS, priority: int = 0) -> list[Completion]:
    """Return the completions of requests, the last of which ends a few tokens after the others."""
    for i in range(num_requests):
        more = NUM_STEPS if i == num_requests - 1 else 0
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
    assert {n: captured.num_checks for n, captured in graphs._graphs.items()} == {1: 0, 3: 0}


START_ENGINES = """
import sys
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
for folder in sys.argv[1:]:
    assert Engine(folder, EngineConfig(dtype="bfloat16")).runner._graphs is not None, folder
"""


def test_there_are_graphs_in_a_process_that_has_run_no_step(checkpoints: dict[str, Path]) -> None:
    """Start engines whose first step computes numbers that are kept, which prevents no graph."""
    folders = [str(checkpoints[architecture]) for architecture in FAMILIES]
    subprocess.run([sys.executable, "-c", START_ENGINES, *folders], check=True)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "fp8"}, {"async_scheduling": True}])
@pytest.mark.parametrize("architecture", FIRST_FAMILIES[:1])
def test_formats_and_steps_ahead(checkpoints: dict[str, Path], architecture: str, options: dict[str, str]) -> None:
    graphs = compare(checkpoints[architecture], EngineConfig(dtype="bfloat16", **options), 2)  # type: ignore[arg-type]
    assert {n: captured.num_checks for n, captured in graphs._graphs.items()} == {1: 0, 2: 0}


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


def read_first(forward: Any, self: Experts, x: torch.Tensor, *args: Any) -> Any:
    """Read a number on the host, as a tensor's method that dispatches."""
    assert not x[0, 0].isnan().item()
    return forward(self, x, *args)


def change_by_number(forward: Any, self: Experts, x: torch.Tensor, *args: Any) -> Any:
    """Read a number on the host that no graph sees, and use it."""
    out = forward(self, x, *args)
    return out * float(x[0, 0].tolist())


def write_beside(forward: Any, self: Experts, x: torch.Tensor, *args: Any) -> Any:
    """Write a tensor without PyTorch."""
    out = torch.empty_like(x)
    out.view(torch.uint16).numpy()[:] = forward(self, x, *args).view(torch.uint16).numpy()
    return out


@pytest.mark.parametrize("from_the_start", [True, False])
@pytest.mark.parametrize("layer", [read_first, change_by_number, write_beside])
def test_what_no_graph_can_repeat_runs_as_it_is(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layer: Any,
    from_the_start: bool,
) -> None:
    """It is found, and each step counts each expert once."""
    folder, config, forward = str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16"), Experts.forward
    engine = None if from_the_start else Engine(folder, config)
    monkeypatch.setattr(Experts, "forward", lambda *args: layer(forward, *args))
    plain = Engine(folder, replace(config, cuda_graphs=False))
    want = run(plain, 2)
    with caplog.at_level(logging.INFO, logger="moray"):
        engine = engine or Engine(folder, config)
        assert run(engine, 2) == want
    assert torch.equal(engine.expert_tokens(), plain.expert_tokens())
    assert engine.runner._graphs is None or graphs_of(engine)._graphs == {}
    assert caplog.text.count("Decodes run without graphs from now on") == 1
    levels = {r.levelname for r in caplog.records if "without graphs" in r.getMessage()}
    assert levels == {"INFO" if layer is read_first else "WARNING"}


def test_a_step_without_numbers_ends_no_graph(checkpoints: dict[str, Path]) -> None:
    """A graph that is compared gives NaN as the kernels do. The row fails, and the next one has its answer."""
    folder, config = str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16")
    want, engine = run(Engine(folder, config), 1), Engine(folder, config)
    engine.add(Request("fails", [5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True)))
    for _ in range(CAPTURE_AFTER + 3):
        engine.step()
    assert 0 < graphs_of(engine)._graphs[1].num_checks < NUM_CHECKS
    weight = engine.runner.model.get_parameter("norm.weight")
    before = weight.data.clone()
    weight.data[:] = torch.nan
    (failed,) = engine.step()
    assert failed.completion is not None and failed.completion.finish_reason == "error"
    weight.data[:] = before
    assert run(engine, 1) == want
    assert graphs_of(engine)._graphs[1].num_checks == 0


def test_no_memory_for_a_graph_is_no_failed_step(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, config = str(checkpoints["mixtral"]), EngineConfig(dtype="bfloat16")
    want, engine = run(Engine(folder, config), 2), Engine(folder, config)
    monkeypatch.setattr(GraphMemory, "empty", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    assert run(engine, 2) == want
    assert engine.metrics.lowered_limits == 0 and "you tried to allocate 1152921504606846976 bytes" in caplog.text


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
