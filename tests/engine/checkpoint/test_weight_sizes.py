"""The weights of a rank as they are measured from names and shapes, compared with the parameters that a model makes."""

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from repository import CONFIGS
from tiny_checkpoints import PHIMOE, PHIXTRAL

from moray.engine.checkpoint.model_config import parse_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.checkpoint.weight_sizes import measure_weights
from moray.engine.config import ModelConfig
from moray.engine.models import ARCHITECTURES
from moray.engine.partition import SIZES, Partition
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.runner.quantized_weights import QuantizedWeights

ITEM_BYTES = 2


@cache
def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / name / "config.json").read_text())
    return config


# Two heads of keys and values, which four and eight ranks share, and a vocabulary that no number of ranks divides.
SHARED = PHIMOE | {"num_attention_heads": 8, "hidden_size": 128, "vocab_size": 161}
MODELS = {
    "phi-3.5-moe": published("phi-3.5-moe"),
    "mixtral-8x7b": published("mixtral-8x7b"),
    "phixtral": published("phixtral-4x2_8"),
    "qwen3": published("qwen3-30b-a3b"),
    "granite": published("granite-3.1-1b-a400m"),
    "olmoe": published("olmoe-1b-7b"),
    "qwen2": published("qwen1.5-moe-a2.7b-chat"),
    "gpt-oss": published("gpt-oss-20b"),
    "shared heads": SHARED,
    "shared heads, fused": PHIXTRAL | {"n_head": 8, "n_head_kv": 2, "n_embd": 128, "vocab_size": 161},
}


@pytest.mark.parametrize("kind", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4"))])
@pytest.mark.parametrize("name", MODELS)
def test_each_rank_has_what_was_measured(name: str, kind: OnLoadKind | None) -> None:
    config = with_quantization(parse_model_config(MODELS[name], {}, name), kind, name)
    tensors = {
        name: StoredTensor(name, "model.safetensors", "BF16", target.shape, 0, 0)
        for name, target in ARCHITECTURES[config.architecture].tensor_map(config).items()
    }
    sizes = measure_weights(tensors, config, ITEM_BYTES)
    assert sizes.rank_bytes == {size: held_bytes(config, Partition(size - 1, size)) for size in SIZES}
    assert sizes.num_bytes == sizes.rank_bytes[1] < 8 * sizes.rank_bytes[8]
    assert held_bytes(config, Partition(0, 4)) == sizes.rank_bytes[4]


def held_bytes(config: ModelConfig, partition: Partition) -> int:
    """The bytes of the parameters of a rank, as its model makes them."""
    architecture = ARCHITECTURES[config.architecture]
    quantized = QuantizedWeights(config.quantization, architecture.tensor_map(config)).params
    with torch.device("meta"):
        model = architecture(config, partition)
    num_bytes = 0
    for name, parameter in model.named_parameters():
        if config.quantization is not None and name in quantized:
            *experts, rows, columns = parameter.shape
            num_bytes += math.prod(experts) * config.quantization.weight_bytes(rows, columns)
        else:
            num_bytes += parameter.numel() * ITEM_BYTES
    return num_bytes


def test_a_model_that_cannot_be_split_has_no_sizes_of_ranks() -> None:
    config = parse_model_config(
        PHIMOE | {"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 3}, {}, ""
    )
    tensors = {"lm_head.weight": StoredTensor("lm_head.weight", "model.safetensors", "BF16", (160, 96), 0, 0)}
    assert measure_weights(tensors, config, ITEM_BYTES).rank_bytes == {1: 160 * 96 * 2}


def test_ranks_may_have_whole_experts_that_they_cannot_divide() -> None:
    config = parse_model_config(PHIMOE | {"intermediate_size": 37}, {}, "")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors = {name: StoredTensor(name, "model.safetensors", "BF16", (37, config.hidden_size), 0, 0)}
    sizes = measure_weights(tensors, config, ITEM_BYTES).rank_bytes
    assert sizes[2] == 19 * config.hidden_size * 2
