"""Read ModelConfig from config.json and generation_config.json, as published or as transformers 5 saves them.

An option that would change the arithmetic and is not supported is an error that names it.
"""

from pathlib import Path
from typing import Any

from moray.engine.checkpoint.config_fields import read_dtype, read_heads
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.json_file import read_json
from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.published import read_kv_cache, read_scheme

# Options of related models that are not implemented -> the values, besides null, that switch them off.
OFF: dict[str, tuple[object, ...]] = {
    "quantization": (),  # MLX's
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "routed_scaling_factor": (1,),
    "partial_rotary_factor": (1,),
    "layer_types": (),
    "mlp_bias": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "alibi": (False,),
    "num_shared_experts": (0,),
    "n_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "img_processor": (),
    "tie_word_embeddings": (False,),
}


def read_model_config(folder: Path) -> ModelConfig:
    """Return the config of the model in `folder`.

    Raises CheckpointError with every problem: file, key, value and what is supported.
    """
    generation = folder / "generation_config.json"
    return parse_model_config(
        read_json(folder / "config.json"), read_json(generation) if generation.exists() else {}, str(folder)
    )


def parse_model_config(values: dict[str, Any], generation_values: dict[str, Any], where: str) -> ModelConfig:
    """Return the config from the contents of config.json and generation_config.json. where: their folder, for errors"""
    path = f"{where}/config.json"
    architecture = values.get("model_type")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type is {architecture!r}; supported: {', '.join(FAMILIES)} (phi-msft with experts only)."
        )
    options, generation = JsonOptions(values, FAMILIES[architecture].spelling), JsonOptions(generation_values)
    for key, inert in OFF.items():
        if key not in FAMILIES[architecture].reads:
            options.expect(key, *inert)
    config = _read(architecture, options, generation)
    problems = [f"{path}: {problem}" for problem in options.problems]
    problems += [f"{where}/generation_config.json: {problem}" for problem in generation.problems]
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    return config


def _read(architecture: str, options: JsonOptions, generation: JsonOptions) -> ModelConfig:
    heads, head_dim = read_heads(options)
    max_position = options.whole("max_position_embeddings")
    has_window = FAMILIES[architecture].has_window
    window = options.whole("sliding_window", default=max_position) if has_window else max_position
    bos = options.value("bos_token_id")
    shared: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": options.whole("vocab_size"),
        "hidden_size": options.whole("hidden_size"),
        "num_layers": options.whole("num_hidden_layers"),
        "num_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "norm_eps": options.number("rms_norm_eps"),
        "dtype": read_dtype(options, FAMILIES[architecture].dtype),
        "sliding_window": window if window < max_position else None,
        "bos_token_id": None if bos is None else options.whole("bos_token_id", minimum=0),
        "eos_token_ids": tuple(dict.fromkeys(options.token_ids("eos_token_id") + generation.token_ids("eos_token_id"))),
        "generation_eos_token_ids": tuple(generation.token_ids("eos_token_id")),
        "quantization": read_scheme(options, FAMILIES[architecture].names),
        "published_kv_cache": read_kv_cache(options),
    }
    return FAMILIES[architecture].read(options, shared)
