"""Engine on the Triton kernels: continuous batching, chunks, preemption and prefix hits give the CPU's tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_device import DEVICE

import engine.engine
from engine.config import EngineConfig
from engine.device import Device
from engine.engine import Engine
from engine.params import SamplingParams
from engine.request import Request
from engine.scoring import Score, score, scoring_params

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


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_tokens_equal_the_cpus(
    checkpoints: dict[str, Path], architecture: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, want = generate(checkpoints[architecture], replace(CONFIG, device="cpu"))
    device = Device(torch.device(DEVICE), "triton")
    monkeypatch.setattr(engine.engine, "choose_device", lambda name: device)
    ours, tokens = generate(checkpoints[architecture], replace(CONFIG, async_scheduling=is_async))
    assert tokens == want
    assert ours.runner.device is device
    assert (ours.expert_tokens().sum(dim=1) == 2 * ours.metrics.computed_tokens).all()
    assert is_async or torch.equal(ours.expert_tokens(), cpu.expert_tokens())


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


@pytest.mark.parametrize("is_async", [False, True])
def test_scores_equal_the_cpus(checkpoints: dict[str, Path], is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    want = score_all(checkpoints["mixtral"], replace(CONFIG, device="cpu"))
    monkeypatch.setattr(engine.engine, "choose_device", lambda name: Device(torch.device(DEVICE), "triton"))
    scores = score_all(checkpoints["mixtral"], replace(CONFIG, async_scheduling=is_async))
    assert scores.keys() == want.keys() == {0, 1, 2}
    for sample, expected in want.items():
        assert scores[sample].logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert scores[sample].is_greedy == expected.is_greedy
