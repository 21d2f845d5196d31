"""The config of Qwen3's models with experts."""

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


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("attention_bias", False)
    options.expect("use_sliding_window", False)
    return ModelConfig(
        **shared,
        **read_experts(options, "num_experts"),
        **read_dense_layers(options, shared["num_layers"]),
        intermediate_size=options.whole("moe_intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False, yarn=True),
        norm_topk_prob=options.flag("norm_topk_prob"),
    )


QWEN3_MOE = Family(_read, QWEN_MATRICES, has_window=False)
