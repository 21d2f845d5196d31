"""Tests of the register of weight formats: a format that a test adds holds the weights of the whole model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moray.engine.backends.cpu.backend import CPU
from moray.engine.backends.cpu.packed import choose_experts
from moray.engine.backends.formats import ExpertsKernel, ExpertWeights, LinearKernel, RoutingRule
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.layers.linear import Linear
from moray.engine.layers.moe import Experts
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.kernels.cpu.experts import experts_ref
from moray.kernels.cpu.linear import linear_ref

ARCHITECTURES = ("phimoe", "mixtral", "phi-msft")


class Quantized:
    """A weight as int8, with a scale for each row."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(-1, keepdim=True) / 127
        self.integers = (weight / self.scale).round().to(torch.int8)

    def restore(self) -> Tensor:
        return self.integers * self.scale


class Int8Format:
    """A slow format, which counts what it packs."""

    def __init__(self) -> None:
        self.num_packed = 0

    def pack_linear(self, weight: Tensor, bias: Tensor | None, num_outputs: int) -> LinearKernel:
        self.num_packed += 1
        quantized = Quantized(weight)
        return lambda x: linear_ref(x, quantized.restore(), bias)

    def pack_experts(self, weights: ExpertWeights) -> ExpertsKernel:
        self.num_packed += 1
        up, down, biases = Quantized(weights.up), Quantized(weights.down), (weights.up_bias, weights.down_bias)

        def run(
            x: Tensor, logits: Tensor, rule: RoutingRule, num_tokens: Tensor | None, tokens_per_expert: Tensor | None
        ) -> Tensor:
            chosen = choose_experts(logits, rule)
            if tokens_per_expert is not None:
                tokens_per_expert += chosen[1].flatten().bincount(minlength=len(tokens_per_expert))
            return experts_ref(x, *chosen, up.restore(), down.restore(), *biases, activation=weights.activation)

        return run


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> Iterator[Int8Format]:
    """Hold fp32 weights in int8 from now on."""
    int8 = Int8Format()
    monkeypatch.setitem(CPU.weight_formats, torch.float32, int8)
    yield int8


def first_logprobs(folder: Path, dtype: str = "float32") -> Tensor:
    engine = Engine(str(folder), EngineConfig(device="cpu", dtype=dtype, kv_cache_memory=200_000))
    params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    engine.add(Request("r", list(range(5, 45)), params))
    while engine.has_work:
        for output in engine.step():
            assert output.completion is not None and output.completion.prompt_logprobs is not None
            logprobs = [entry.logprob for entry in output.completion.prompt_logprobs if entry is not None]
    assert engine.expert_tokens().sum() == 2 * 2 * 40
    return torch.tensor(logprobs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_format_that_is_added_holds_the_whole_model(
    checkpoints: dict[str, Path], architecture: str, int8: Int8Format
) -> None:
    folder = checkpoints[architecture]
    model = load_model(folder, read_model_config(folder), torch.float32)
    assert int8.num_packed == sum(isinstance(module, Linear | Experts) for module in model.modules())
    found = first_logprobs(folder)
    half = first_logprobs(folder, "bfloat16")  # by the format of another dtype
    assert (found - half).abs().median() < 0.1 and not torch.equal(found, half)


@pytest.mark.parametrize("dtype", CPU.weight_formats)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_not_kept_beside_their_packed_form(
    checkpoints: dict[str, Path], architecture: str, dtype: torch.dtype
) -> None:
    folder = checkpoints[architecture]
    model = load_model(folder, read_model_config(folder), dtype)
    assert [
        name.split(".")[0] for name, param in model.named_parameters() if param.dim() > 1 and "bias" not in name
    ] in (
        ["embed_tokens"],
        ["wte"],
    )
