"""ModelConfig read from config.json and generation_config.json as plain JSON, in the published spelling and in that of
transformers 5. An option that would change the arithmetic and is not supported stops the load by name."""

from pathlib import Path
from typing import Any

from engine.checkpoint.json_file import read_json
from engine.checkpoint.json_options import JsonOptions
from engine.config import DTYPES, ModelConfig, RopeConfig
from engine.errors import CheckpointError

# Our names of keys (Mixtral's) -> the file's.
PHI_MSFT_SPELLING = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head_kv",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
SPELLING: dict[str, dict[str, str]] = {"phimoe": {}, "phi-msft": PHI_MSFT_SPELLING, "mixtral": {}}

PHI_MSFT_THETA = 10_000.0  # in the published code, never in its config.json

# Options of related models that our arithmetic does not have -> the values, beside null, that switch them off.
OFF: dict[str, tuple[object, ...]] = {
    "quantization_config": (),
    "compression_config": (),
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
    """The model in `folder`. Raises CheckpointError with every problem: file, key, value, what is supported."""
    generation = folder / "generation_config.json"
    return parse_model_config(
        read_json(folder / "config.json"), read_json(generation) if generation.exists() else {}, str(folder)
    )


def parse_model_config(values: dict[str, Any], generation_values: dict[str, Any], where: str) -> ModelConfig:
    """The same from the contents of config.json and generation_config.json; `where` is their folder, for errors."""
    path = f"{where}/config.json"
    architecture = values.get("model_type")
    if not isinstance(architecture, str) or architecture not in SPELLING:
        raise CheckpointError(
            f"{path}: model_type is {architecture!r}; supported: {', '.join(SPELLING)} (phi-msft with experts only)."
        )
    options, generation = JsonOptions(values, SPELLING[architecture]), JsonOptions(generation_values)
    for key, inert in OFF.items():
        options.expect(key, *inert)
    config = _read(architecture, options, generation)
    problems = [f"{path}: {problem}" for problem in options.problems]
    problems += [f"{where}/generation_config.json: {problem}" for problem in generation.problems]
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    return config


def _read(architecture: str, options: JsonOptions, generation: JsonOptions) -> ModelConfig:
    heads, head_dim = _heads(options)
    max_position = options.whole("max_position_embeddings")
    window = options.whole("sliding_window", default=max_position)
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
        "dtype": _dtype(options),
        "sliding_window": window if window < max_position else None,
        "bos_token_id": None if bos is None else options.whole("bos_token_id", least=0),
        "eos_token_ids": tuple(dict.fromkeys(options.token_ids("eos_token_id") + generation.token_ids("eos_token_id"))),
        "generation_eos_token_ids": tuple(generation.token_ids("eos_token_id")),
    }
    if architecture == "phi-msft":
        return _phi_msft(options, shared)
    return _phimoe(options, shared) if architecture == "phimoe" else _mixtral(options, shared)


def _phimoe(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("norm_topk_prob", False)
    experts = _experts(options)
    if experts["num_experts_per_tok"] != 2:
        options.refuse(options.state("num_experts_per_tok"), "2 (sparsemixer picks two experts)")
    return ModelConfig(
        **shared,
        **experts,
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=_kv_heads(options, shared["num_heads"]),
        rope=_rope(options, shared["head_dim"], longrope=True),
        attention_bias=options.flag("attention_bias"),
        lm_head_bias=options.flag("lm_head_bias"),
        router_jitter=options.number("router_jitter_noise", default=0.01, zero=True),
    )


def _mixtral(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("norm_topk_prob", True)
    options.expect("attention_bias", False)
    return ModelConfig(
        **shared,
        **_experts(options),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=_kv_heads(options, shared["num_heads"]),
        rope=_rope(options, shared["head_dim"], longrope=False),
    )


def _phi_msft(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "gelu_new")
    options.expect("rope_theta", PHI_MSFT_THETA)
    for key in ("rope_scaling", "rope_parameters", "sliding_window"):
        options.expect(key)
    if options.whole("num_local_experts", default=1) == 1:
        options.refuse(options.state("num_local_experts"), "2 or more (dense Phi-2 is no mixture of experts)")
    rotary_dim = options.whole("rotary_dim", least=2)
    if rotary_dim % 2 or rotary_dim > shared["head_dim"]:
        options.refuse(options.state("rotary_dim"), f"an even number up to the head's size, {shared['head_dim']}")
    return ModelConfig(
        **shared,
        **_experts(options),
        intermediate_size=options.whole("intermediate_size", default=4 * shared["hidden_size"]),
        num_kv_heads=_kv_heads(options, shared["num_heads"], default=shared["num_heads"]),
        rope=RopeConfig(PHI_MSFT_THETA, rotary_dim),
        attention_bias=True,
        lm_head_bias=True,
    )


def _heads(options: JsonOptions) -> tuple[int, int]:
    """-> number of query heads, size of a head"""
    heads, hidden_size = options.whole("num_attention_heads"), options.whole("hidden_size")
    if options.value("head_dim") is None and hidden_size % heads:
        options.refuse(
            f"{options.state('hidden_size')} and {options.state('num_attention_heads')}",
            "a hidden size that the heads divide, or a head_dim",
        )
    head_dim = options.whole("head_dim", default=max(2, hidden_size // heads))
    if head_dim % 2:
        options.refuse(f"the size of a head is {head_dim}", "an even number")
    return heads, head_dim


def _kv_heads(options: JsonOptions, num_heads: int, default: int | None = None) -> int:
    """Null means as many as query heads; absent is refused unless the reference class means the same by it."""
    if options.holds("num_key_value_heads"):
        default = num_heads
    kv_heads = options.whole("num_key_value_heads", default)
    if num_heads % kv_heads:
        options.refuse(options.state("num_key_value_heads"), f"a divisor of the {num_heads} query heads")
    return kv_heads


def _experts(options: JsonOptions) -> dict[str, Any]:
    count, top_k = options.whole("num_local_experts"), options.whole("num_experts_per_tok")
    if top_k > count:
        options.refuse(options.state("num_experts_per_tok"), f"at most num_local_experts, {count}")
    return {"num_experts": count, "num_experts_per_tok": top_k}


def _dtype(options: JsonOptions) -> str:
    dtype = options.one_of("dtype", "torch_dtype")
    if dtype not in DTYPES[1:]:
        key = "dtype" if options.value("dtype") is not None else "torch_dtype"
        options.refuse(options.state(key), ", ".join(DTYPES[1:]))
    return str(dtype)


def _rope(options: JsonOptions, head_dim: int, *, longrope: bool) -> RopeConfig:
    """Published: rope_theta beside rope_scaling (null, or an object). transformers 5: both inside rope_parameters."""
    key = "rope_parameters" if options.value("rope_parameters") is not None else "rope_scaling"
    if key == "rope_parameters" and options.value("rope_scaling") not in (None, options.value(key)):
        options.refuse("rope_parameters and rope_scaling are both there and differ", "one of them")
    rope = options.inner(key)
    rope.expect("partial_rotary_factor", 1)
    theta = _in_either(options, rope, "rope_theta").number("rope_theta")
    kind = rope.one_of("rope_type", "type") or "default"
    if kind == "longrope" and longrope:
        original = _in_either(options, rope, "original_max_position_embeddings")
        return RopeConfig(
            theta,
            head_dim,
            short_factor=rope.numbers("short_factor", head_dim // 2),
            long_factor=rope.numbers("long_factor", head_dim // 2),
            # The reference takes these as they stand and computes no substitute where they are missing.
            short_mscale=rope.number("short_mscale"),
            long_mscale=rope.number("long_mscale"),
            original_max_position_embeddings=original.whole("original_max_position_embeddings"),
        )
    if kind != "default":
        options.refuse(f"{key}.rope_type (or type) is {kind!r}", "default or longrope" if longrope else "default")
    return RopeConfig(theta, head_dim)


def _in_either(options: JsonOptions, rope: JsonOptions, key: str) -> JsonOptions:
    """Where the key stands: inside the rope object or at the top level; if in both, they must agree."""
    inside, outside = rope.value(key), options.value(key)
    if inside is not None and outside is not None and inside != outside:
        options.refuse(f"{options.state(key)} and {rope.state(key)}", "one value for both")
    return options if inside is None else rope
