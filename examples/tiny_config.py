"""config.json and generation_config.json of the tiny model, spelled as Microsoft published Phi-3.5-MoE's."""

from copy import deepcopy
from typing import Any

from transformers import PhimoeConfig

MSCALE = 1.243163121016122  # that of Phi-3.5-MoE's config; the formula with the lengths below gives another value

CONFIG: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1000,
    "eos_token_id": 1000,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 256,
    "lm_head_bias": True,
    "max_position_embeddings": 2048,
    "model_type": "phimoe",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "original_max_position_embeddings": 1024,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        # Every fourth of Phi-3.5-MoE's factors, whose heads are four times as wide.
        "long_factor": [
            1.0199999809265137, 1.0499999523162842, 1.059999942779541, 1.0999999046325684,
            1.4899998903274536, 4.299999713897705, 12.050000190734863, 21.420000076293945,
            38.730003356933594, 47.590003967285156, 57.4900016784668, 61.779998779296875,
            63.560001373291016, 63.980003356933594, 64.04000854492188, 64.75,
        ],
        "long_mscale": MSCALE,
        "original_max_position_embeddings": 1024,
        "short_factor": [
            1.0, 1.0499999523162842, 1.0499999523162842, 1.0499999523162842,
            1.0699999332427979, 1.1399999856948853, 1.159999966621399, 1.3399999141693115,
            1.5899999141693115, 1.9099998474121094, 1.9999998807907104, 2.009999990463257,
            2.009999990463257, 2.009999990463257, 2.009999990463257, 2.419999837875366,
        ],
        "short_mscale": MSCALE,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 1024,
}  # fmt: skip

GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": 1000,
    "eos_token_id": [1000, 1001, 1007],
    "pad_token_id": 1000,
    "transformers_version": "4.43.3",
}


def phimoe_config(**changes: Any) -> PhimoeConfig:
    """Return transformers' config of the tiny model, with changes."""
    # a copy, because transformers writes its own keys into rope_scaling
    return PhimoeConfig.from_dict(deepcopy(CONFIG) | changes)
