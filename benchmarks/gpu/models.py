"""The models that are measured: published configs, tiny models of the same architectures, and random weights."""

import atexit
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray.engine.backends.base import Backend
from moray.engine.config import ModelConfig
from moray.engine.layers.moe import Experts
from moray.engine.layers.post_load import process_weights_after_loading
from moray.engine.models import ARCHITECTURES
from moray.engine.models.base import CausalLM
from moray.engine.quantization.on_load import quantize
from moray.engine.quantization.stored_part import StoredPart
from moray.engine.runner.loader import build_model, held_rows_of
from moray.engine.runner.quantized_weights import QuantizedWeights

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = ("phi-3.5-moe", "phixtral-4x2_8", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
STD = 0.02  # of random weights, as in the reference implementations; with it routers use all experts

Fill = Callable[[Tensor], object]


@cache
def folder(name: str, layers: int | None = None, *, is_tiny: bool = False) -> Path:
    """Return a folder with the model's config.json: as published, with fewer layers, or of a tiny model.

    Its file of weights is empty: they are random, and made where the model runs.
    """
    config = json.loads((CONFIGS / name / "config.json").read_text())
    is_phixtral = config["model_type"] == "phi-msft"
    if is_tiny:
        config |= _tiny_phixtral() if is_phixtral else _tiny(config)
    if layers is not None:
        config["n_layer" if is_phixtral else "num_hidden_layers"] = layers
    made = Path(tempfile.mkdtemp(prefix=f"moray-{name}-"))
    atexit.register(shutil.rmtree, made)
    (made / "config.json").write_text(json.dumps(config))
    (made / "model.safetensors").touch()
    return made


def _tiny(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    small |= {name: 4 for name in ("num_local_experts", "num_experts") if name in config}
    small |= {name: 64 for name in ("moe_intermediate_size",) if name in config}
    small |= {name: 2 for name in ("num_experts_per_tok", "experts_per_token") if name in config}
    if "head_dim" in config:
        small["head_dim"] = 16
    if "layer_types" in config:
        small["layer_types"] = config["layer_types"][:2]
    if "long_factor" in (scaling := config.get("rope_scaling") or {}):
        small["rope_scaling"] = scaling | {name: scaling[name][:8] for name in ("short_factor", "long_factor")}
    return small


def _tiny_phixtral() -> dict[str, Any]:
    return {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 160, "n_inner": 64}


def random_model(
    _: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend, fill: Fill | None = None
) -> CausalLM:
    """Make a model with random weights on its device, ready to run, as the function `load` of an Engine.

    Weights that are quantized on load are made one by one, by their published names, in bf16.

    fill: fills a parameter with values; None = normal ones, made on the device, the same in every process
    """
    model = build_model(config, dtype, backend)
    _fill_others(model, fill)
    quantized = QuantizedWeights(config.quantization, ARCHITECTURES[config.architecture].tensor_map(config))
    process_weights_after_loading(model, backend, quantized.packers(model, _RandomTensors(fill)))
    return model


def dequantized_model(
    _: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend, fill: Fill | None = None
) -> CausalLM:
    """Make the model of which random_model multiplies the codes, with the numbers that these stand for instead."""
    tensor_map = ARCHITECTURES[config.architecture].tensor_map(config)
    quantized = QuantizedWeights(config.quantization, tensor_map)
    assert config.quantization is not None, "nothing is quantized"
    scheme, tensors = config.quantization, _RandomTensors(fill)
    model = build_model(replace(config, quantization=None), dtype, backend)
    _fill_others(model, fill)
    parameters = dict(model.named_parameters())
    for name, part in quantized.parts.items():
        (stored,) = tensors.read({name: part}, backend.torch_device, None).values()
        weight = quantize(stored, scheme.kind, scheme.group_size).dequantize()
        parameters[tensor_map[name].param].data[tensor_map[name].index].copy_(weight)
    process_weights_after_loading(model, backend)
    return model


def _fill_others(model: CausalLM, fill: Fill | None) -> None:
    """Fill all parameters but those that get no memory because they will be quantized.

    A rank's part of a parameter gets the values that it has in the whole.
    """
    held = held_rows_of(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            if (rows := held.get(name)) is None:
                _fill(name, parameter.data, fill)
            else:
                is_of_experts = isinstance(model.get_submodule(name.rpartition(".")[0]), Experts)
                parts = parameter.data.transpose(0, 1) if is_of_experts else parameter.data
                shape = list(parameter.shape)
                shape[1 if is_of_experts else 0] = rows.total
                whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                _fill(name, whole, fill)
                whole = whole.transpose(0, 1) if is_of_experts else whole
                parts.copy_(torch.cat([whole[part] for part in rows.held]))
            if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
                parameter.data += 1


class _RandomTensors:
    """Makes up the tensors that a checkpoint of random weights would have stored."""

    def __init__(self, fill: Fill | None) -> None:
        self._values = fill

    def read(
        self, parts: Mapping[str, StoredPart], device: torch.device, rows: Sequence[slice] | None, /
    ) -> dict[str, Tensor]:
        """Make tensors in bf16, whose values depend on the name alone."""
        made = {name: torch.empty(part.shape, dtype=torch.bfloat16, device=device) for name, part in parts.items()}
        for name, tensor in made.items():
            _fill(name, tensor, self._values)
        return made if rows is None else {name: torch.cat([made[name][part] for part in rows]) for name in made}


def _fill(name: str, tensor: Tensor, fill: Fill | None) -> None:
    """Fill a tensor with values that its name decides, whatever its dtype and whatever was filled before."""
    torch.manual_seed(zlib.crc32(name.encode()))
    values = torch.empty_like(tensor, dtype=torch.float32)
    (fill or _normal)(values)
    tensor.copy_(values)


def _normal(tensor: Tensor) -> None:
    tensor.normal_(std=STD)
