"""Tests of the scales of an fp8 KV cache: those of a checkpoint, and those that are calibrated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import MIXTRAL, PHIMOE, write
from torch import Tensor

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError
from moray.engine.layers.attention import attention_layers
from moray.engine.runner.kv_scales import calibration_prompt, scales_for

STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
PUBLISHED = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": STATIC}


def engine(folder: Path, **config: Any) -> Engine:
    return Engine(str(folder), EngineConfig(device="cpu", kv_cache_memory=1 << 18, num_threads=1, **config))


def scales_of(loaded: Engine) -> list[list[list[float]]]:
    return [layer.kv_scales.scales.tolist() for layer in attention_layers(loaded.runner.model)]


def published(tmp_path: Path, scales: dict[str, Tensor]) -> Path:
    """Write a model whose KV cache alone is quantized."""
    folder = write(tmp_path / "m", MIXTRAL | {"quantization_config": PUBLISHED})
    save_file(load_file(folder / "model.safetensors") | scales, folder / "model.safetensors")
    return folder


def test_scales_are_powers_of_two_with_room_for_larger_numbers() -> None:
    largest = torch.tensor([448.0, 449.0, 1.0, 112.0, 0.0, torch.inf, torch.nan, 1e-30])
    scales = scales_for(largest)
    assert scales[:5].tolist() == [4.0, 8.0, 2.0**-6, 1.0, 1.0]
    assert scales[5:7].tolist() == [1.0, 1.0] and scales[7] > 0
    assert (largest[:4] * 4 / scales[:4] <= 448).all() and (largest[:4] * 8 / scales[:4] > 448).all()


def test_the_prompt_of_the_calibration_is_fixed() -> None:
    config = read_model_config(Path("examples/tiny-phimoe"))
    prompt = calibration_prompt(config)
    assert prompt[:4] == [1000, 372, 603, 845] and len(prompt) == 256 and len(set(prompt)) > 128
    assert all(0 <= token < config.vocab_size for token in prompt)
    assert len(calibration_prompt(replace(config, max_position_embeddings=48))) == 48


def test_calibrated_scales_are_those_of_the_models_keys_and_values(checkpoints: dict[str, Path]) -> None:
    """The largest key of each head is what the cache in the model's dtype holds after the prompt, in both rope sets."""
    quantized, plain = engine(checkpoints["phimoe"], kv_cache_dtype="fp8"), engine(checkpoints["phimoe"])
    prompt = calibration_prompt(plain.model_config)
    assert len(prompt) == PHIMOE["original_max_position_embeddings"], "the short factors are for no more"
    found = [torch.zeros(2, 2), torch.zeros(2, 2)]
    for rope_set in (0, 1):
        with torch.inference_mode():
            plain.runner._allocate_cache(2)
            plain.runner._forward(plain.runner._prompt(prompt, [0, 1], rope_set))
        for largest, layer in zip(found, attention_layers(plain.runner.model), strict=True):
            now = torch.stack([cache.abs().amax((0, 2, 3)) for cache in (layer.k_cache, layer.v_cache)])
            torch.maximum(largest, now, out=largest)
    assert scales_of(quantized) == [scales_for(largest).tolist() for largest in found]
    assert quantized.expert_tokens().sum() == 0, "the calibration is no load"


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1)], ids=str)
def test_scales_of_the_checkpoint_are_used_unless_asked_not_to(tmp_path: Path, shape: tuple[int, ...]) -> None:
    numbers = {}
    for layer in range(2):
        for part, value in (("k", 0.02), ("v", 0.3)):
            scale = torch.full(shape, value * (layer + 1), dtype=torch.bfloat16)
            if scale.numel() == 2:
                scale.view(-1)[1] *= 4
            numbers[f"model.layers.{layer}.self_attn.{part}_scale"] = scale
    folder = published(tmp_path, numbers)
    loaded = engine(folder)
    assert loaded.model_config.kv_cache is not None and loaded.model_config.kv_cache.is_stored
    for layer, found in enumerate(scales_of(loaded)):
        stored = [numbers[f"model.layers.{layer}.self_attn.{part}_scale"].float().flatten() for part in "kv"]
        assert found == [scale.expand(2).tolist() for scale in stored]
    assert attention_layers(engine(folder, kv_cache_dtype="model").runner.model)[0].k_cache.dtype == torch.float32


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            torch.ones(3),
            r"self_attn.k_scale is \[3\] float32; a scale of the KV cache is one float, or 2, one for each",
        ),
        (torch.ones(1, dtype=torch.int32), r"k_scale is \[1\] int32"),
        (torch.tensor([1.0, 0.0]), r"k_scale has a scale of 0 to 1; all must be above 0"),
        (torch.tensor([torch.nan]), r"k_scale has a scale of nan"),
    ],
)
def test_a_wrong_scale_is_an_error_that_names_it(tmp_path: Path, scale: Tensor, message: str) -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"]
    folder = published(tmp_path, {name: torch.ones(1) for name in names} | {names[0]: scale})
    with pytest.raises(CheckpointError, match=message):
        engine(folder)
