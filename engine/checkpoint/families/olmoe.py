"""The config of OLMoE."""

from typing import Any

from moray.engine.checkpoint.config_fields import QWEN_MATRICES, read_experts, read_kv_heads, read_rope
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("attention_bias", False)
    options.expect("sliding_window")
    return ModelConfig(
        **shared,
        **read_experts(options, "num_experts"),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"], default=shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False),
        clip_qkv=None if options.value("clip_qkv") is None else options.number("clip_qkv"),
        norm_topk_prob=options.flag("norm_topk_prob"),
    )


OLMOE = Family(_read, QWEN_MATRICES, has_window=False)
