"""The config of phixtral, as Microsoft's original Phi code spells it."""

from typing import Any

from moray.engine.checkpoint.config_fields import read_experts, read_kv_heads
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import ModelConfig, RopeConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames

THETA = 10_000.0  # from the published code; no config.json has it

SPELLING = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head_kv",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "gelu_new")
    options.expect("rope_theta", THETA)
    for key in ("rope_scaling", "rope_parameters", "sliding_window"):
        options.expect(key)
    if options.whole("num_local_experts", default=1) == 1:
        options.refuse(options.describe("num_local_experts"), "2 or more (dense Phi-2 is no mixture of experts)")
    rotary_dim = options.whole("rotary_dim", minimum=2)
    if rotary_dim % 2 or rotary_dim > shared["head_dim"]:
        options.refuse(options.describe("rotary_dim"), f"an even number up to the head's size, {shared['head_dim']}")
    return ModelConfig(
        **shared,
        **read_experts(options),
        intermediate_size=options.whole("intermediate_size", default=4 * shared["hidden_size"]),
        num_kv_heads=read_kv_heads(options, shared["num_heads"], default=shared["num_heads"]),
        rope=RopeConfig(THETA, rotary_dim),
        attention_bias=True,
        lm_head_bias=True,
    )


MATRICES = MatrixNames(
    r"transformer\.embd\.wte", r".*\.moe\.gate", r"lm_head\.linear", (r"(.*\.moe\.mlp)\.\d+\.fc[12]",)
)
PHI_MSFT = Family(_read, MATRICES, SPELLING)
