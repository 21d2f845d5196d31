"""The config of Granite's models with experts."""

from typing import Any

from moray.engine.checkpoint.config_fields import read_experts, read_kv_heads, read_rope
from moray.engine.checkpoint.families.family import Family, Stack
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("attention_bias", False)
    options.expect("sliding_window")
    multipliers: dict[str, Any] = {name: options.number(name, default=1.0) for name in MULTIPLIERS}
    return ModelConfig(
        **shared,
        **read_experts(options),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"], default=shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False),
        **multipliers,
        tie_word_embeddings=options.flag("tie_word_embeddings"),
    )


MATRICES = MatrixNames(
    r"model\.embed_tokens",
    r".*\.router\.layer",
    "lm_head",
    (r"(.*\.self_attn)\.[qkv]_proj", r"(.*\.block_sparse_moe)\.(?:input|output)_linear\.\d+"),
)
GRANITEMOE = Family(
    _read,
    MATRICES,
    reads=(*MULTIPLIERS, "tie_word_embeddings"),
    has_window=False,
    stacks=(Stack(r"(.*\.block_sparse_moe\.(?:input|output)_linear)\.weight", (r"\1.{}.weight",)),),
)
