"""Tests of decode steps in the fixed shapes of graphs: padding changes nothing, and a replay gives the same bits."""

import gc
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_backend import TRITON

from moray.engine.backends.cuda.decode_graphs import DecodeGraphs, fill, padding
from moray.engine.backends.inputs import ModelInputs
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.core.graph_shapes import MAX_GRAPHS, graph_sizes, graphs_bytes, round_up, table_widths
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.inputs import plan_step
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner


def test_sizes_and_widths_cover_all() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert graph_sizes(41)[-2:] == [40, 41]
    for most in (3, 64, 100, 256, 512, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(n <= round_up(n, sizes) <= max(n + 7, n * 5 / 4) for n in range(1, most + 1))
    assert table_widths(5) == [5]
    assert table_widths(64) == [64]
    assert table_widths(65) == [64, 65]
    assert table_widths(8192) == [64, 256, 1024, 4096, 8192]


def test_memory_is_left_for_graphs_but_little_of_a_small_card() -> None:
    mib = 1 << 20
    assert graphs_bytes(256, 64, 50_000 * mib) == (512 + 19 * 8) * mib
    assert graphs_bytes(256, 8192, 50_000 * mib) == (512 + MAX_GRAPHS * 8) * mib
    assert graphs_bytes(256, 8192, 5_000 * mib) == 500 * mib
    assert graphs_bytes(256, 8192, -1) == 0


class Recorded:
    """A graph on a machine without CUDA: a replay repeats the calls that were made while it was captured."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace CUDA's part of a capture, and return the options of each capture."""
    asked: list[dict[str, Any]] = []

    @contextmanager
    def graph(graph: object, **options: Any) -> Iterator[None]:
        asked.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return asked


def test_graphs_are_bounded_and_the_one_used_longest_ago_goes(captures: list[dict[str, Any]]) -> None:
    shapes: list[tuple[int, ...]] = []

    def forward(inputs: ModelInputs) -> torch.Tensor:
        shapes.append(tuple(inputs.attention.block_tables.shape))
        return torch.zeros(len(inputs.input_ids), 4)

    graphs = DecodeGraphs(forward, 256, 8192, torch.device("cpu"))
    graphs.capture()
    assert {width for _, width in shapes} == {64}, "five widths are too many to capture at once"
    for width in table_widths(8192):
        for size in graph_sizes(256):
            graphs.run(padding(1, 64, torch.device("cpu")))  # stays the most recently used
            graphs.run(padding(size, width, torch.device("cpu")))
            assert len(graphs._graphs) <= MAX_GRAPHS
    assert len(shapes) == 2 * len(set(shapes)) == 2 * len(captures), "each was run once and captured once"
    assert next(reversed(graphs._graphs)) == (256, 8192) and (1, 64) in graphs._graphs and (2, 64) not in graphs._graphs
    assert captures[0] == {"pool": "pool", "capture_error_mode": "thread_local"}
    few = DecodeGraphs(forward, 256, 256, torch.device("cpu"))
    shapes.clear()
    few.capture()
    assert set(shapes) == {(size, width) for size in graph_sizes(256) for width in (64, 256)}


def test_a_capture_waits_for_the_other_ranks_with_an_eye_on_them(
    captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before a capture gathers: a rank that has failed would let the host wait in synchronize for ever."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))

    def forward(inputs: ModelInputs) -> torch.Tensor:
        calls.append("forward")
        return torch.zeros(1, 4)

    DecodeGraphs(forward, 1, 64, torch.device("cpu"), lambda: calls.append("wait")).capture()
    assert calls == ["forward", "wait", "synchronize", "forward"]


def test_nothing_is_collected_while_a_graph_is_captured(captures: list[dict[str, Any]]) -> None:
    collecting: list[bool] = []

    def forward(inputs: ModelInputs) -> torch.Tensor:
        collecting.append(gc.isenabled())
        if len(collecting) == 4:
            raise RuntimeError("no memory")
        return torch.zeros(1, 4)

    graphs = DecodeGraphs(forward, 2, 64, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no memory"):
        graphs.capture()
    assert collecting == [True, False, True, False] and gc.isenabled()


def decoding(runner: ModelRunner, lengths: list[int]) -> list[Scheduled]:
    """Return sequences whose prompts have run, which are about to decode."""
    generator, first_block, prompts = torch.Generator().manual_seed(0), 0, []
    for n, length in enumerate(lengths):
        seq = Sequence(
            n, Request(str(n), torch.randint(0, 160, (length,), generator=generator).tolist(), SamplingParams())
        )
        num_blocks = length // runner.block_size + 1
        seq.block_table = array("i", range(first_block, first_block + num_blocks))
        first_block += num_blocks
        prompts.append(Scheduled(seq, length))
    runner.run(prompts)
    for item in prompts:
        item.seq.num_computed_tokens = item.num_tokens
        item.seq.append(7 + item.num_tokens % 100)
    return [Scheduled(item.seq, 1) for item in prompts]


@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "phi-msft"))]
)
def test_padding_changes_no_bit(one_layer: dict[str, Path], architecture: str) -> None:
    config = read_model_config(one_layer[architecture])
    model = load_model(one_layer[architecture], config, torch.bfloat16, TRITON)
    runner = ModelRunner(model, config, torch.bfloat16, block_size=16, backend=TRITON)
    runner.allocate_cache(16)
    step = decoding(runner, [3, 20, 16])
    inputs = TRITON.build_inputs(plan_step(step), 16)
    runner.expert_load.reset()
    with torch.inference_mode():
        exact = model(inputs).clone()
        counted = runner.expert_load.read()
        caches = [cache.clone() for layer in attention_layers(model) for cache in (layer.k_cache, layer.v_cache)]
        for size, width in ((3, 2), (8, 4)):
            fixed = padding(size, width, TRITON.torch_device)
            fill(fixed, TRITON.build_inputs(plan_step(step[:1]), 16))
            fill(fixed, inputs)  # over another step, as when a graph is used again
            runner.expert_load.reset()
            assert torch.equal(model(fixed)[:3], exact)
            assert torch.equal(runner.expert_load.read(), counted) and counted.sum() == config.num_layers * 2 * 3
            fill(fixed, TRITON.build_inputs(plan_step(step[1:]), 16))
            assert torch.equal(model(fixed)[:2], exact[1:])
        now = [cache for layer in attention_layers(model) for cache in (layer.k_cache, layer.v_cache)]
        assert all(torch.equal(a, b) for a, b in zip(caches, now, strict=True)), "padding writes no key"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_graphs_give_the_same_bits_as_launching(checkpoints: dict[str, Path], architecture: str) -> None:
    def completions(cuda_graphs: bool) -> tuple[dict[str, object], object]:
        config = EngineConfig(
            device="cuda", dtype="bfloat16", max_num_seqs=11, kv_cache_memory=2**24, cuda_graphs=cuda_graphs
        )
        engine = Engine(str(checkpoints[architecture]), config)
        params = SamplingParams(max_tokens=40, temperature=1.0, logprobs=3, ignore_eos=True)
        for n in range(20):
            prompt = torch.randint(0, 160, (1 + 7 * n,), generator=torch.Generator().manual_seed(n)).tolist()
            engine.add(Request(str(n), prompt, params, stream_key=n))
        done: dict[str, object] = {}
        while engine.has_work:
            done |= {output.request_id: output.completion for output in engine.step() if output.completion}
        return done, engine.expert_tokens().tolist()

    assert completions(True) == completions(False)
