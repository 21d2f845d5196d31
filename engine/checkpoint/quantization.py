"""Decide how a model's weights are quantized, from its config and what was asked for. No torch: plans use it too."""

from dataclasses import replace
from math import gcd

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError
from moray.engine.quantization.scheme import OnLoadKind, Scheme

INT4_GROUP_SIZES = (128, 64, 32)


def with_quantization(config: ModelConfig, kind: OnLoadKind | None, where: str) -> ModelConfig:
    """Return the config of the model as it will run: with the scheme of its weights.

    kind:   what to quantize the weights to while they are loaded; None = they stay as the checkpoint has them
    where:  the model's folder, for errors

    Raises CheckpointError if the checkpoint is quantized already.
    """
    if kind is None:
        return config
    if config.quantization is not None:
        raise CheckpointError(
            f"{where} is quantized already ({config.quantization.label}), so it cannot be quantized to {kind} on load; "
            "set quantization to null to run it as published, or name a checkpoint of bfloat16 or float16 weights."
        )
    return replace(config, quantization=on_load_scheme(config, kind))


def on_load_scheme(config: ModelConfig, kind: OnLoadKind) -> Scheme:
    """Return the scheme of weights that are quantized while they are loaded.

    Those of experts and attention are. The router decides between experts, the embedding is a table that is only looked
    up, and errors of the head reach every logit: these stay as they are, with norms and biases.
    """
    group_size = None
    if kind == "int4":
        inner = config.intermediate_size, config.dense_intermediate_size, config.shared_intermediate_size
        common = gcd(config.hidden_size, *inner, config.num_heads * config.head_dim)  # 0, for none, divides nothing out
        group_size = next((size for size in INT4_GROUP_SIZES if common % size == 0), INT4_GROUP_SIZES[-1])
    return Scheme("on_load", kind, group_size, ignore=FAMILIES[config.architecture].names.patterns)
