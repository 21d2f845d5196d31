"""Tests of engines with an fp8 KV cache: how much it changes, what it saves, and that its bits depend on no batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_alone import run
from tiny_checkpoints import GPT_OSS, MIXTRAL, write
from torch import Tensor

from moray.engine.config import EngineConfig
from moray.engine.core.limits import BLOCK_SIZE, cache_bytes
from moray.engine.engine import Engine
from moray.engine.layers.attention import attention_layers
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request
from moray.kernels.e4m3 import KvScales

# All experts run, so that no small difference chooses another one, which would be a large one.
ALL_EXPERTS = {"num_experts_per_tok": 8, "experts_per_token": 8}
BOUND = 0.15  # of the median over tokens of |changed logits - logits| / |logits|
SCALES = torch.tensor([[2**-4, 2**-2], [2**-3, 2**-5]])  # of random models' heads, whose numbers are up to 10


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine(folder: Path, **config: Any) -> Engine:
    config = {"kv_cache_memory": 1 << 18, "kv_cache_dtype": "fp8", "num_threads": 1} | config
    return Engine(str(folder), EngineConfig(device="cpu", **config))


def logits(of: Engine) -> Tensor:
    """Return the logits of a prompt. Its blocks are the cache's first."""
    tokens = prompt(60)
    with torch.inference_mode():
        hidden = of.runner._forward(of.runner._prompt(tokens, list(range(4))))
        return of.runner._compute_logits(hidden, range(60))


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median().item()


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=lambda config: str(config["model_type"]))
def test_logits_change_little_and_mistakes_with_scales_change_them_much(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write(tmp_path / "m", config | {key: 8 for key in ALL_EXPERTS if key in config})
    plain, quantized = engine(folder, kv_cache_dtype="model"), engine(folder)
    wanted = logits(plain)
    assert 0.01 < distance(logits(quantized), wanted) < BOUND
    layers = attention_layers(quantized.runner.model)
    for layer in layers:
        layer.take_kv_scales(SCALES)
    assert 0.01 < distance(logits(quantized), wanted) < BOUND, "whatever the scales are"
    wrong = {
        "that of another head": SCALES.flip(1),
        "that of values for keys": SCALES.flip(0),
        "not applied to values": torch.stack((SCALES[0], torch.ones(2))),
        "not applied to keys": torch.stack((torch.ones(2), SCALES[1])),
    }
    for mistake, scales in wrong.items():
        for layer in layers:
            layer.kv_scales = KvScales(scales, 1 / SCALES)
        assert distance(logits(quantized), wanted) > 2 * BOUND, mistake


def test_the_same_memory_holds_more_tokens(checkpoints: dict[str, Path]) -> None:
    plain, quantized = (engine(checkpoints["mixtral"], kv_cache_dtype=dtype) for dtype in ("model", "fp8"))
    assert quantized.limits.num_blocks == 4 * plain.limits.num_blocks  # of float32
    layer = attention_layers(quantized.runner.model)[0]
    assert layer.k_cache.dtype == layer.v_cache.dtype == torch.float8_e4m3fn
    of_layer = layer.k_cache.nbytes + layer.v_cache.nbytes
    assert of_layer * 2 == 1 << 18, "the cache takes the bytes that it may take"


def requests() -> list[Request]:
    """Prompts that share a prefix, that grow beyond phimoe's 32 tokens of short factors, and that are sampled."""
    greedy = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
    sampled = SamplingParams(max_tokens=9, temperature=1.3, n=2, seed=4, ignore_eos=True, logprobs=2)
    shared = prompt(40, 9)
    return [
        Request("crosses", prompt(27, 1), greedy),
        Request("sampled", prompt(17, 2), sampled),
        Request("short", prompt(3, 3), greedy),
        Request("shared 1", [*shared, 7, 8], greedy),
        Request("shared 2", [*shared, 9], greedy),
    ]


@pytest.mark.parametrize(
    "family", ["phimoe", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi-msft", "qwen2_moe"))]
)
def test_answers_do_not_depend_on_the_batch(checkpoints: dict[str, Path], family: str) -> None:
    """Alone, in chunks, with a cache so small that sequences are preempted, and again: the bits are the same."""
    folder = checkpoints[family]
    together = engine(folder, dtype="bfloat16")
    want = run(together, requests())
    assert together.metrics.cached_tokens > 0
    assert run(together, requests()) == want, "with the prefixes that the cache has now"
    alone: dict[tuple[str, int], Completion] = {}
    one = engine(folder, dtype="bfloat16", max_num_seqs=1)
    for request in requests():
        alone |= run(one, [request])
    assert alone == want
    few_blocks = cache_bytes(5 * BLOCK_SIZE, together.model_config, 2)
    small = engine(folder, dtype="bfloat16", max_num_batched_tokens=7, max_num_seqs=4, kv_cache_memory=few_blocks)
    assert run(small, requests()) == want
    assert small.metrics.preemptions > 0
    assert run(engine(folder, dtype="bfloat16", kv_cache_dtype="model"), requests()) != want, "fp8 changes something"
