"""Decide how keys and values are stored, from a model's config and tensors and what was asked for. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError
from moray.engine.quantization.kv_cache import KvCacheDtype, KvCacheScheme, find_scales


def with_kv_cache(
    config: ModelConfig, dtype: KvCacheDtype | None, tensors: Callable[[], Iterable[str]], where: str
) -> ModelConfig:
    """Return the config of the model as it will run: with the scheme of its KV cache.

    dtype:    what keys and values are stored in; None = e4m3 where the checkpoint says so and has the scales, else the
              dtype of the model
    tensors:  returns the names of the stored tensors
    where:    the model's folder, for errors

    Raises CheckpointError if the checkpoint has only some of the scales.
    """
    if dtype == "model" or (dtype is None and config.published_kv_cache != "fp8"):
        return config
    is_stored = config.published_kv_cache == "fp8" and _has_scales(config, tensors(), where)
    return replace(config, kv_cache=KvCacheScheme(is_stored)) if is_stored or dtype == "fp8" else config


def _has_scales(config: ModelConfig, tensors: Iterable[str], where: str) -> bool:
    """Return whether the checkpoint has the scales of every layer."""
    found = find_scales(tensors)
    missing = [f"layer {layer}'s {part}" for layer in range(config.num_layers) for part in "kv"
               if (layer, part) not in found]  # fmt: skip
    if missing and found:
        raise CheckpointError(
            f"{where} has scales for an fp8 KV cache, but not {missing[0]}_scale ({len(missing)} are missing); set "
            "kv_cache_dtype to model to store keys and values in the model's dtype."
        )
    return not missing
