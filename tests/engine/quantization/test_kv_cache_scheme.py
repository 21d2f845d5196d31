"""Tests of what checkpoints say of the KV cache, and of what follows from that and from what was asked for."""

from typing import Any

import pytest
from tiny_checkpoints import MIXTRAL

from moray.engine.checkpoint.kv_cache import with_kv_cache
from moray.engine.checkpoint.model_config import parse_model_config
from moray.engine.config import ModelConfig
from moray.engine.core.limits import cache_bytes_per_token
from moray.engine.errors import CheckpointError
from moray.engine.quantization.kv_cache import KvCacheScheme, find_scales

STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
SCALES = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"]


def config_with(scheme: Any, **quantization: Any) -> ModelConfig:
    """Return the config of a model whose KV cache alone is quantized, unless there is more."""
    inner = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme} | quantization
    return parse_model_config(MIXTRAL | {"quantization_config": inner}, {}, "m")


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (STATIC, "fp8"),
        (STATIC | {"strategy": "attn_head"}, "fp8"),
        (STATIC | {"dynamic": True}, "other"),
        (STATIC | {"symmetric": False}, "other"),
        (STATIC | {"type": "int"}, "other"),
        (STATIC | {"num_bits": 4}, "other"),
        ({"num_bits": 8}, "other"),
    ],
)
def test_a_config_says_what_the_cache_is(scheme: Any, expected: str) -> None:
    config = config_with(scheme)
    assert config.published_kv_cache == expected and config.quantization is None


def test_the_config_of_autofp8_says_it_in_a_word() -> None:
    inner = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    config = parse_model_config(MIXTRAL | {"quantization_config": inner}, {}, "m")
    assert config.published_kv_cache == "fp8" and config.quantization is not None
    assert parse_model_config(MIXTRAL, {}, "m").published_kv_cache is None


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.7.self_attn.k_scale", "model.layers.7.self_attn.v_scale"],
        ["model.layers.7.self_attn.k_proj.k_scale", "model.layers.7.self_attn.v_proj.v_scale"],
        ["model.layers.7.self_attn.attn.k_scale", "model.layers.7.self_attn.attn.v_scale"],
        ["model.layers.7.self_attn.qkv_proj.k_scale", "model.layers.7.self_attn.qkv_proj.v_scale"],
        ["model.layers.7.self_attn.k_proj.output_scale", "model.layers.7.self_attn.v_proj.output_scale"],
        ["model.layers.7.self_attn.kv_scale", "model.layers.7.self_attn.kv_scale"],
    ],
)
def test_scales_have_many_names(names: list[str]) -> None:
    others = ["model.layers.7.self_attn.q_scale", "model.layers.7.self_attn.k_proj.weight_scale", "lm_head.weight",
              "model.layers.7.self_attn.k_proj.input_scale", "model.layers.7.mlp.up_proj.output_scale"]  # fmt: skip
    assert find_scales([*others, *names]) == {(7, "k"): names[0], (7, "v"): names[1]}


def test_auto_follows_the_checkpoint_and_a_word_does_not() -> None:
    says, plain = config_with(STATIC), parse_model_config(MIXTRAL, {}, "m")

    def found(config: ModelConfig, dtype: Any, names: list[str]) -> KvCacheScheme | None:
        return with_kv_cache(config, dtype, lambda: names, "m").kv_cache

    assert found(says, None, SCALES) == KvCacheScheme(is_stored=True)
    assert found(says, None, []) is None, "it says so, and has no scales"
    assert found(says, "model", SCALES) is None
    assert found(says, "fp8", SCALES) == KvCacheScheme(is_stored=True)
    assert found(says, "fp8", []) == KvCacheScheme(is_stored=False)
    assert found(plain, None, SCALES) is None
    assert found(plain, "fp8", []) == KvCacheScheme(is_stored=False)
    assert found(config_with(STATIC | {"type": "int"}), "fp8", SCALES) == KvCacheScheme(is_stored=False), "of integers"
    assert {KvCacheScheme(True).label, KvCacheScheme(False).label} == {"fp8", "fp8/1"}


def test_scales_of_some_layers_are_an_error_that_names_the_first_missing_one() -> None:
    with pytest.raises(CheckpointError, match=r"^m has scales .* but not layer 1's v_scale \(1 are missing\); set"):
        with_kv_cache(config_with(STATIC), None, lambda: SCALES[:-1], "m")


def test_a_token_takes_a_byte_a_number() -> None:
    plain = parse_model_config(MIXTRAL, {}, "m")
    quantized = with_kv_cache(plain, "fp8", list, "m")
    assert cache_bytes_per_token(quantized, 2) == cache_bytes_per_token(quantized, 4) == 2 * 2 * 2 * 16
    assert cache_bytes_per_token(plain, 2) == 2 * cache_bytes_per_token(quantized, 2)
