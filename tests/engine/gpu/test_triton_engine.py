"""Tests that an Engine on the Triton kernels gives the CPU's tokens: batching, chunks, preemption, prefix hits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_backend import TRITON

import moray.engine.runner.open_model
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.models.phimoe import PhimoeForCausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.scoring import Score, score, scoring_params

PROMPT_LENGTHS = (3, 17, 30, 17)
CONFIG = EngineConfig(dtype="float32", max_num_seqs=3, max_num_batched_tokens=24, kv_cache_memory=200_000)


def generate(folder: Path, config: EngineConfig) -> tuple[Engine, dict[str, list[int]]]:
    engine = Engine(str(folder), config)
    tokens: dict[str, list[int]] = {}
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(5, 160, (32,), generator=generator).tolist()
    for i, length in enumerate(PROMPT_LENGTHS):
        params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=float(i % 2), seed=i)
        engine.add(Request(str(i), shared[:length], params, stream_key=i))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return engine, tokens


@pytest.mark.parametrize("is_async", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "phi-msft"))]
)
def test_tokens_equal_the_cpus(
    one_layer: dict[str, Path], architecture: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, want = generate(one_layer[architecture], replace(CONFIG, device="cpu"))
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    ours, tokens = generate(one_layer[architecture], replace(CONFIG, async_scheduling=is_async))
    assert tokens == want
    assert ours.runner.backend is TRITON
    assert (ours.expert_tokens().sum(dim=1) == 2 * ours.metrics.computed_tokens).all()
    assert is_async or torch.equal(ours.expert_tokens(), cpu.expert_tokens())


@pytest.mark.slow
def test_tokens_with_an_fp8_cache_equal_the_cpus(one_layer: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, kv_cache_dtype="fp8")
    cpu, want = generate(one_layer["phimoe"], replace(config, device="cpu"))
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    ours, tokens = generate(one_layer["phimoe"], replace(config, async_scheduling=True))
    assert tokens == want
    for layers in zip(*(attention_layers(engine.runner.model) for engine in (cpu, ours)), strict=True):
        assert torch.equal(layers[0].kv_scales.scales, layers[1].kv_scales.scales.cpu())
        assert {layer.k_cache.dtype for layer in layers} == {torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("where", "is_async"), [pytest.param("forward", True, marks=pytest.mark.slow), ("compute_logits", False)]
)
def test_a_step_that_runs_out_of_memory_runs_once_more(
    one_layer: dict[str, Path], where: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step raises half way, after keys were written and tokens counted; the tokens are as without a failure."""
    _, want = generate(one_layer["phimoe"], replace(CONFIG, device="cpu"))
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    calls = 0

    def sometimes(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(self: object, *args: object) -> Tensor:
            nonlocal calls
            calls += 1
            result = compute(self, *args)
            if calls % 3 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return result

        return call

    monkeypatch.setattr(PhimoeForCausalLM, where, sometimes(getattr(PhimoeForCausalLM, where)))
    ours, tokens = generate(one_layer["phimoe"], replace(CONFIG, async_scheduling=is_async))
    after_loading = 1
    assert tokens == want and len(emptied) == after_loading + calls // 3 > 2
    assert (ours.expert_tokens().sum(dim=1) == 2 * ours.metrics.computed_tokens).all(), "counted once"


def test_a_step_that_runs_out_of_memory_twice_fails(checkpoints: dict[str, Path]) -> None:
    engine = Engine(str(checkpoints["phimoe"]), replace(CONFIG, device="cpu"))
    calls: list[int] = []

    def never(*args: object) -> Tensor:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200 GiB")

    engine.runner.model.forward = never  # type: ignore[method-assign]
    engine.add(Request("r", [5, 6], SamplingParams(max_tokens=2)))
    with pytest.raises(torch.OutOfMemoryError, match="200 GiB"):
        for _ in range(2):
            engine.step()
    assert len(calls) == 2 * 2, "with one token too"


def score_all(folder: Path, config: EngineConfig) -> dict[int, Score]:
    engine = Engine(str(folder), config)
    prompt = torch.randint(5, 160, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    busy = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.add(Request("busy", prompt[:5], busy))
    engine.add(Request("r", prompt, scoring_params(None), continuations=[[7], [8, 9, 10], [11, 12]]))
    scores: dict[int, Score] = {}
    while engine.has_work:
        for output in engine.step():
            if output.request_id == "r" and output.completion is not None and output.completion.prompt_logprobs:
                scores[output.sample] = score([t for t in output.completion.prompt_logprobs if t is not None])
    assert engine.metrics.cached_tokens == 2 * 16
    return scores


@pytest.mark.parametrize("is_async", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scores_equal_the_cpus(one_layer: dict[str, Path], is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    want = score_all(one_layer["mixtral"], replace(CONFIG, device="cpu"))
    monkeypatch.setattr(moray.engine.runner.open_model, "choose_backend", lambda name: TRITON)
    scores = score_all(one_layer["mixtral"], replace(CONFIG, async_scheduling=is_async))
    assert scores.keys() == want.keys() == {0, 1, 2}
    for sample, expected in want.items():
        assert scores[sample].logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert scores[sample].is_greedy == expected.is_greedy
