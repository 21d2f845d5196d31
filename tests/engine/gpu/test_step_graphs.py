"""Tests of steps in the fixed shapes of graphs: padding changes nothing, and a replay gives the same bits."""

import gc
import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hidden_waits import HiddenWaits
from launches import Launches
from torch import Tensor
from triton_backend import TRITON

from moray.engine.backends.cuda.step_buffer import StepBuffer, StepShape
from moray.engine.backends.cuda.step_graphs import CAPTURE_AFTER, CudaGraphs
from moray.engine.backends.inputs import NOT_PENDING, ModelInputs, StepPlan
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.core.graph_shapes import GraphShape, GraphShapes, choose_shapes
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.inputs import plan_step
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner

CPU = torch.device("cpu")


class Recorded:
    """A graph on a machine without CUDA, which counts its replays."""

    captured: ClassVar[list[dict[str, Any]]] = []

    def __init__(self) -> None:
        self.replays = 0

    def capture_begin(self, **options: Any) -> None:
        Recorded.captured.append(options)

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1


def replay(graphs: CudaGraphs, graph: Recorded) -> GraphShape:
    """Compute what a graph would, and return its shape."""
    ((shape, captured),) = (item for item in graphs._graphs.items() if item[1].graph is graph)
    graphs._write(*graphs._run(shape, captured.buffer.inputs))
    return shape


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace CUDA's part of a capture, and return the options of each capture."""

    @contextmanager
    def stream(stream: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(Recorded, "captured", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return Recorded.captured


def shapes_of(max_num_seqs: int, max_blocks: int, **limits: int) -> GraphShapes:
    limits = {"max_num_batched_tokens": 2048, "available_bytes": 1 << 40} | limits
    shapes = choose_shapes(
        max_num_seqs, limits["max_num_batched_tokens"], max_blocks, limits["available_bytes"], lambda tokens: 0
    )
    assert shapes is not None
    return shapes


def plan_of(query_lens: list[int], width: int = 1) -> StepPlan:
    """Plan a step of sequences of these tokens, each with as many cache blocks."""
    seqs = [(length, length, 0, width, NOT_PENDING) for length in query_lens]
    return StepPlan(np.arange(sum(query_lens)), np.array(seqs), np.zeros(width * len(query_lens), np.int32))


class Model:
    """Computes hidden states that say which tokens they are of, and remembers the shapes of its steps."""

    def __init__(self, graphs_of: GraphShapes, **options: Any) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        calls = self.forward, self.compute_logits, TRITON.build_inputs
        self.graphs = CudaGraphs(*calls, graphs_of, CPU, **options)
        self.num_logits: list[int] = []
        self.before: Callable[[], None] = lambda: None

    def forward(self, inputs: ModelInputs) -> Tensor:
        self.before()
        self.shapes.append((len(inputs.input_ids), *inputs.attention.block_tables.shape))
        return inputs.input_ids[:, None].float().expand(-1, 4)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        self.num_logits.append(len(hidden_states))
        return hidden_states.repeat(1, 2) + 0.5

    def step(self, plan: StepPlan) -> Tensor:
        return self.graphs.run(plan, self.graphs.build_inputs(plan, 4096))  # tokens in a block


def test_graphs_of_all_narrow_shapes_are_captured_at_the_start_the_largest_first(
    captures: list[dict[str, Any]],
) -> None:
    of = shapes_of(32, 64)
    model = Model(of)
    model.graphs.capture_at_start()
    assert set(model.shapes) == {*of.of_width(64)} and len(model.shapes) == 2 * len(of.of_width(64)) == 2 * len(
        captures
    )
    assert model.shapes[0] == (2048, 32, 64) and model.shapes[::2] == model.shapes[1::2], "run once, captured once"
    assert captures[0] == {"pool": "pool", "capture_error_mode": "thread_local"}
    model.shapes.clear()
    assert len(model.step(plan_of([1, 30, 7]))) == 38
    assert model.shapes == [], "a graph was replayed"


def test_a_step_without_a_graph_runs_as_it_is_until_its_shape_has_come_often(captures: list[dict[str, Any]]) -> None:
    model = Model(shapes_of(32, 256))
    for times in range(1, CAPTURE_AFTER + 1):
        plan = plan_of([times, 30], width=100)
        assert not model.graphs.replays(plan)
        assert torch.equal(model.step(plan)[:, 0], torch.arange(times + 30.0))
        exact = (times + 30, 2, 100)
        padded = (64, 32, 256)
        assert model.shapes[-2:] == [padded] * 2 if times == CAPTURE_AFTER else model.shapes[-1] == exact
    assert len(captures) == 1
    assert model.graphs.replays(plan) and len(model.step(plan)) == len(plan.input_ids)
    assert len(model.shapes) == CAPTURE_AFTER + 1


def test_graphs_of_few_decodes_compute_logits(captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(shapes_of(256, 64))
    model.graphs.capture_at_start()
    assert sorted({*model.num_logits}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    monkeypatch.setattr(Recorded, "replay", lambda graph: replay(model.graphs, graph))
    for lens, has_logits in (([1] * 30, True), ([1] * 65, False), ([1] * 20 + [3], True), ([1, 3], False), ([1], True)):
        hidden_states, logits = model.step(plan_of(lens)), model.graphs.find_logits()
        assert torch.equal(hidden_states[:, 0], torch.arange(float(sum(lens))))
        assert (logits is not None) is has_logits
        assert logits is None or torch.equal(logits, hidden_states.repeat(1, 2) + 0.5)
    model.step(plan_of([1, 1], width=100))
    assert model.graphs.find_logits() is None, "this step had no graph"


def test_larger_steps_than_any_graph_run_as_they_are(captures: list[dict[str, Any]]) -> None:
    model = Model(shapes_of(32, 64, max_num_batched_tokens=8192))
    model.graphs.capture_at_start()
    for _ in range(2 * CAPTURE_AFTER):
        assert len(model.step(plan_of([2048, 1]))) == 2049
        assert model.shapes[-1] == (2049, 2, 1)


def test_graphs_are_bounded_and_the_one_used_longest_ago_goes(captures: list[dict[str, Any]]) -> None:
    of = shapes_of(256, 8192)
    model = Model(of)
    model.graphs.capture_at_start()
    kept = model.graphs._graphs
    assert {shape.width for shape in kept} == {64, 256} and len(kept) == of.max_graphs
    for tokens in (8, 16, 24):
        for _ in range(CAPTURE_AFTER):
            model.step(plan_of([1]))  # stays the most recently used
            model.step(plan_of([1] * tokens, width=8000))
        assert len(kept) <= of.max_graphs
    assert next(reversed(kept)) == (24, 24, 8192) and (1, 1, 64) in kept and (2048, 256, 256) not in kept


def test_all_ranks_wait_for_each_other_before_a_capture(
    captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before a capture gathers: a rank that has failed would let the host wait in synchronize for ever."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    model = Model(shapes_of(1, 64, max_num_batched_tokens=1), wait=lambda: calls.append("wait"), is_alone=False)
    model.before = lambda: calls.append("forward")
    model.graphs.capture_at_start()
    assert calls == ["forward", "wait", "synchronize", "forward"]


def test_nothing_is_collected_while_a_graph_is_captured(captures: list[dict[str, Any]]) -> None:
    collecting: list[bool] = []
    model = Model(shapes_of(2, 64, max_num_batched_tokens=2))

    def before() -> None:
        collecting.append(gc.isenabled())
        if len(collecting) == 4:
            raise RuntimeError("no kernel")

    model.before = before
    with pytest.raises(RuntimeError, match="no kernel"):
        model.graphs.capture_at_start()
    assert collecting == [True, False, True, False] and gc.isenabled()


@pytest.mark.parametrize("is_alone", [True, False])
def test_without_memory_for_another_graph_steps_go_on(
    captures: list[dict[str, Any]], is_alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(shapes_of(4, 64, max_num_batched_tokens=64), is_alone=is_alone)
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.before = before
    if not is_alone:  # the others would replay what this one has not
        with pytest.raises(torch.OutOfMemoryError):
            model.graphs.capture_at_start()
        return
    with caplog.at_level(logging.WARNING):
        model.graphs.capture_at_start()
    assert "CUDA out of memory" in caplog.text and "run without a graph" in caplog.text
    assert list(model.graphs._graphs) == [(64, 4, 64)]
    for _ in range(2 * CAPTURE_AFTER):
        assert torch.equal(model.step(plan_of([1, 1]))[:, 0], torch.arange(2.0))
    assert model.shapes[-1] == (2, 2, 1) and len(captures) == 2


def mixed(runner: ModelRunner, decodes: list[int], chunk: tuple[int, int], prompt: int) -> list[Scheduled]:
    """Return a step with decodes, a later chunk of a prompt and the whole of another; what is before it has run."""
    generator, first_block, before, step = torch.Generator().manual_seed(0), 0, [], []
    lengths = [*((length, length, 1) for length in decodes), (sum(chunk), *chunk), (prompt, 0, prompt)]
    for n, (length, num_computed, num_tokens) in enumerate(lengths):
        prompt_ids = torch.randint(0, 160, (length,), generator=generator).tolist()
        seq = Sequence(n, Request(str(n), prompt_ids, SamplingParams()))
        num_blocks = length // runner.block_size + 1
        seq.block_table = array("i", range(first_block, first_block + num_blocks))
        first_block += num_blocks
        if num_computed:
            before.append(Scheduled(seq, num_computed))
        step.append(Scheduled(seq, num_tokens))
    runner.run(before)
    for item in before:
        item.seq.num_computed_tokens = item.num_tokens
        if item.num_tokens == len(item.seq):
            item.seq.append(7 + item.num_tokens % 100)
    return step


def padded(shape: GraphShape) -> StepBuffer:
    of = StepShape(*shape)
    return StepBuffer(of, torch.full((of.num_bytes,), 0x55, dtype=torch.uint8, device=TRITON.torch_device))


FAMILIES = ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "phi-msft"))]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen2_moe")]


@pytest.mark.parametrize("architecture", [*FAMILIES, *OTHERS])
def test_padding_changes_no_bit_and_no_launch(one_layer: dict[str, Path], architecture: str) -> None:
    """A step is run as it is and in a fixed shape, after another step, as when a graph is used again.

    What a graph launches follows from its shape alone: it is the same for both steps.
    """
    config = read_model_config(one_layer[architecture])
    model = load_model(one_layer[architecture], config, torch.bfloat16, TRITON)
    runner = ModelRunner(model, config, torch.bfloat16, block_size=16, backend=TRITON)
    runner.allocate_cache(16)
    step = mixed(runner, [3, 20], (13, 4), 5)
    decodes, plan = plan_step(step[:2]), plan_step(step)
    caches = [cache for layer in attention_layers(model) for cache in (layer.k_cache, layer.v_cache)]
    before = [cache.clone() for cache in caches]

    def run(inputs: ModelInputs) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the hidden states, the load of the experts and the cache of a step that starts from the same cache."""
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        runner.expert_load.reset()
        return model(inputs).clone(), runner.expert_load.copy(), [cache.clone() for cache in caches]

    with torch.inference_mode():
        exact, counted, written = run(TRITON.build_inputs(plan, 16))
        assert counted.sum() == config.num_layers * config.num_experts_per_tok * plan.num_tokens
        buffer, launched = padded(GraphShape(16, 6, 3)), []
        for other in (decodes, plan):
            buffer.load(other, 16)
            with Launches() as launches, HiddenWaits({"routing.py:sparsemixer_threshold"}) as waits:
                hidden_states, load, now = run(buffer.inputs)
            launched.append(launches.found)
            assert waits.found == [], "no capture can wait"
            rows = slice(other.num_tokens)
            assert torch.equal(hidden_states[rows], exact[rows])
        assert torch.equal(load, counted), "padding goes to no expert"
        assert all(map(torch.equal, now, written)), "padding writes no key"
        assert launched[0] and launched[0] == launched[1]


def test_a_runner_takes_the_logits_of_a_graph(
    one_layer: dict[str, Path], captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_model_config(one_layer["phimoe"])
    model = load_model(one_layer["phimoe"], config, torch.bfloat16, TRITON)
    sent: list[str] = []
    send = lambda name, *arguments: sent.append(name)  # noqa: E731
    runner = ModelRunner(model, config, torch.bfloat16, block_size=16, backend=TRITON, send=send)
    runner.allocate_cache(16)
    decodes = mixed(runner, [3, 20], (13, 4), 5)[:2]
    exact = runner.compute_logits(runner.run(decodes), [0, 1])
    assert sent[-2:] == ["run_plan", "repeat_logits"]
    with torch.inference_mode():
        calls = runner._forward, model.compute_logits, TRITON.build_inputs
        graphs = CudaGraphs(*calls, GraphShapes((2, 4), 4, (), 4, (), (3,), 2, 0, 3), CPU)
        graphs.capture_at_start()
    monkeypatch.setattr(Recorded, "replay", lambda graph: replay(graphs, graph))
    runner._graphs = graphs
    hidden_states = runner.run(decodes)
    assert torch.equal(runner.compute_logits(hidden_states, [0, 1]), exact)
    assert torch.equal(runner.compute_logits(hidden_states, [1]), exact[1:])
    assert sent[-1] == "run_plan", "the other ranks' graphs have computed their part"


@pytest.mark.slow
def test_an_engine_with_graphs_gives_the_same_answers(
    one_layer: dict[str, Path], captures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs replay by calling the model again. Steps have prompts and decodes; some come before their shape's graph.

    Two of the three graphs that there may be are captured at the start, the others when they are needed.
    """
    shapes = GraphShapes((1, 2), 4, (8, 16), 4, (), (2,), 3, 0, 2)
    monkeypatch.setattr(GraphShapes, "at_start", property(lambda self: self.of_width(2)[:2]))
    monkeypatch.setattr("moray.engine.backends.cuda.step_graphs.CAPTURE_AFTER", 1)
    made: list[CudaGraphs] = []

    def capture_graphs(
        forward: Callable[[ModelInputs], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        of: GraphShapes,
        counters: Tensor,
    ) -> CudaGraphs:
        graphs = CudaGraphs(forward, compute_logits, TRITON.build_inputs, shapes, TRITON.torch_device)
        made.append(graphs)
        monkeypatch.setattr(Recorded, "replay", lambda graph: count_replay(graphs, graph))
        graphs.capture_at_start()
        return graphs

    num_replays = num_logits = 0

    def count_replay(graphs: CudaGraphs, graph: Recorded) -> None:
        nonlocal num_replays, num_logits
        num_replays += 1
        num_logits += replay(graphs, graph).has_logits

    def completions() -> dict[str, Any]:
        config = EngineConfig(
            dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, kv_cache_memory=200_000, async_scheduling=True
        )
        engine = Engine(str(one_layer["phimoe"]), config)
        for n, length in enumerate((3, 14, 7, 1)):
            params = SamplingParams(max_tokens=2 + 3 * n, temperature=1.0, ignore_eos=True)
            engine.add(Request(str(n), list(range(5, 5 + length)), params, stream_key=n))
        done: dict[str, Any] = {}
        while engine.has_work:
            done |= {output.request_id: output.completion for output in engine.step() if output.completion}
        return done  # tokens of experts are counted twice: this capture computes the step

    monkeypatch.setattr("moray.engine.runner.open_model.choose_backend", lambda name: TRITON)
    monkeypatch.setattr("moray.engine.runner.open_model.choose_graphs", lambda *_, **options: shapes)
    exact = completions()
    assert not made
    monkeypatch.setattr(TRITON, "capture_graphs", capture_graphs)
    assert completions() == exact
    assert num_replays >= 2 and num_logits >= 1 and len(captures) >= 3 and len(made[0]._graphs) <= 3


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
