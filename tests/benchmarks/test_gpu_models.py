"""The random models of the GPU benchmark: what is quantized is the same weights as the reference has."""

from array import array
from collections.abc import Callable

import pytest
import torch
from bench_gpu import STAGES
from gpu.anchors import ANCHORS
from gpu.engine_plan import QUANTIZED_DECODE, loads_of, models, plan
from gpu.features import available_features
from gpu.model_formats import CASES, kind_of, with_format
from gpu.models import NAMES, dequantized_model, folder, random_model
from torch import Tensor
from triton_backend import TRITON

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import ModelConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.models.base import CausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.model_runner import ModelRunner

TOKENS = [5, 17, 3, 99, 140, 8]


def logits(load: Callable[..., CausalLM], config: ModelConfig, backend: Backend = CPU) -> Tensor:
    model = load(folder(NAMES[0]), config, torch.float32, backend, lambda tensor: tensor.normal_(std=0.2))
    runner = ModelRunner(model, config, torch.float32, block_size=16, backend=backend)
    runner.allocate_cache(1)
    seq = Sequence(0, Request("r", TOKENS, SamplingParams()))
    seq.rope_set, seq.block_table = 0, array("i", [0])
    return runner.compute_logits(runner.run([Scheduled(seq, len(TOKENS))]), range(len(TOKENS)))


def tiny(name: str, weights: str) -> ModelConfig:
    path = folder(name, is_tiny=True)
    return with_quantization(read_model_config(path), kind_of(weights), str(path))


@pytest.mark.parametrize("weights", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "fp8"))])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_has_the_numbers_that_the_codes_stand_for(name: str, weights: str) -> None:
    config = tiny(name, weights)
    torch.testing.assert_close(logits(random_model, config), logits(dequantized_model, config), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_rows_in_fp8_are_multiplied_where_they_are_asked_for() -> None:
    """Their error is that of the 4 bits of fp8, not that of fp32, and not that of other weights, which is 1 or more."""
    config = tiny(NAMES[0], "fp8_fp8")
    wanted = logits(dequantized_model, config, TRITON)
    found, exact = (logits(random_model, config, with_format(TRITON, name)) for name in ("fp8_fp8", "fp8"))
    torch.testing.assert_close(exact, wanted, atol=1e-4, rtol=1e-4)
    assert 0.01 < float((found - wanted).norm() / wanted.norm()) < 0.6


def test_every_format_is_measured_beside_bf16_within_nine_minutes() -> None:
    phi = NAMES[0]
    assert sum(STAGES.values()) == 540
    assert [weights for name, weights in models(is_dry=True) if name == phi] == ["bf16", "int8", "int4", "fp8"]
    dense, *_ = plan(phi, "bf16")
    for weights in CASES:
        [quantized] = plan(phi, weights)
        assert [load.num_sequences for load in quantized.loads] == list(QUANTIZED_DECODE) == [1, 32, 256]
        assert set(quantized.loads) <= set(dense.loads)


def test_models_with_published_figures_come_first_and_have_a_mixed_load() -> None:
    first = [name for name, _ in models(is_dry=True)][:4]
    assert {anchor.model for anchor in ANCHORS} == set(first)
    for name, weights in models(is_dry=True)[:4]:
        assert any(load.kind == "mixed" for measured in plan(name, weights) for load in measured.loads)


def test_the_loads_of_the_engines_own_limits() -> None:
    """The last one is what a GPU had before, so that it shows whether more sequences pay."""
    own = next(measured for measured in plan(NAMES[0], "bf16") if not measured.loads)
    assert "max_num_seqs" not in own.settings
    assert [load.num_sequences for load in loads_of(own, 704)] == [704, 352, 256]
    assert [load.num_sequences for load in loads_of(own, 256)] == [256]


def test_a_feature_turns_itself_on_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"as it is": {"cuda_graphs": True}, "not there": {"no_such_key": 1}}
    monkeypatch.setattr("gpu.features.FEATURES", features)
    assert available_features() == {"as it is": {"cuda_graphs": True}}
    assert "moray with as it is" in [measured.label for measured in plan(NAMES[0], "bf16")]
