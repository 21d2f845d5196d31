"""The config of Qwen1.5's and Qwen2's models with experts."""

from typing import Any

from moray.engine.checkpoint.config_fields import (
    QWEN_MATRICES,
    read_dense_layers,
    read_experts,
    read_kv_heads,
    read_rope,
)
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions

FULL = "full_attention"


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("attention_bias", False)
    options.expect("use_sliding_window", False)  # which layers have a window differs among versions of the reference
    options.expect("qkv_bias", True, False)
    if set(options.texts("layer_types")) - {FULL}:
        options.refuse(options.describe("layer_types"), f"{FULL!r} for every layer")
    return ModelConfig(
        **shared,
        **read_experts(options, "num_experts"),
        **read_dense_layers(options, shared["num_layers"]),
        intermediate_size=options.whole("moe_intermediate_size"),
        shared_intermediate_size=options.whole("shared_expert_intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False, yarn=True),
        attention_bias=options.value("qkv_bias") is not False,  # no published file has the key
        norm_topk_prob=options.flag("norm_topk_prob"),
    )


QWEN2_MOE = Family(_read, QWEN_MATRICES, reads=("layer_types", "shared_expert_intermediate_size"), has_window=False)
