"""The config of Phi-3.5-MoE and its smaller relatives."""

from typing import Any

from moray.engine.checkpoint.config_fields import LLAMA_MATRICES, LLAMA_NAMES, read_experts, read_kv_heads, read_rope
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("norm_topk_prob", False)
    experts = read_experts(options)
    if experts["num_experts_per_tok"] != 2:
        options.refuse(options.describe("num_experts_per_tok"), "2 (sparsemixer picks two experts)")
    return ModelConfig(
        **shared,
        **experts,
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=True),
        attention_bias=options.flag("attention_bias"),
        lm_head_bias=options.flag("lm_head_bias"),
        router_jitter=options.number("router_jitter_noise", default=0.01, zero=True),
    )


PHIMOE = Family(_read, LLAMA_MATRICES, other_names=LLAMA_NAMES)
