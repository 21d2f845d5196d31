"""The config of Mixtral, and of merged models with its architecture."""

from typing import Any

from moray.engine.checkpoint.config_fields import LLAMA_MATRICES, LLAMA_NAMES, read_experts, read_kv_heads, read_rope
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("norm_topk_prob", True)
    options.expect("attention_bias", False)
    return ModelConfig(
        **shared,
        **read_experts(options),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False),
    )


MIXTRAL = Family(_read, LLAMA_MATRICES, other_names=LLAMA_NAMES)
