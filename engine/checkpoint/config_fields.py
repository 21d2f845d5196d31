"""Read what several families spell alike in their config.json: heads, experts, dtype and the rotary embedding."""

from typing import Any

from moray.engine.checkpoint.yarn import read_yarn
from moray.engine.config import DTYPES, RopeConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames

# Parts of names as transformers 5 calls its modules -> the published ones, of Mixtral and of models in its form.
LLAMA_NAMES = {
    "mlp": "block_sparse_moe", "router": "gate", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
}  # fmt: skip

# The families whose published names are those of transformers' modules: Qwen's and OLMoE's.
QWEN_MATRICES = MatrixNames(
    r"model\.embed_tokens",
    r".*\.(?:gate|shared_expert_gate)",
    "lm_head",
    (
        r"(.*\.self_attn)\.[qkv]_proj",
        r"(.*\.experts)\.\d+\.(?:gate|up|down)_proj",
        r"(.*\.(?:mlp|shared_expert))\.(?:gate|up|down)_proj",
    ),
)

LLAMA_MATRICES = MatrixNames(
    r"model\.embed_tokens", r".*\.gate", "lm_head", (r"(.*\.self_attn)\.[qkv]_proj", r"(.*\.experts)\.\d+\.w[123]")
)


def read_heads(options: JsonOptions) -> tuple[int, int]:
    """Return the number of query heads and the size of a head."""
    heads, hidden_size = options.whole("num_attention_heads"), options.whole("hidden_size")
    if options.value("head_dim") is None and hidden_size % heads:
        options.refuse(
            f"{options.describe('hidden_size')} and {options.describe('num_attention_heads')}",
            "a hidden size that the heads divide, or a head_dim",
        )
    head_dim = options.whole("head_dim", default=max(2, hidden_size // heads))
    if head_dim % 2:
        options.refuse(f"the size of a head is {head_dim}", "an even number")
    return heads, head_dim


def read_kv_heads(options: JsonOptions, num_heads: int, default: int | None = None) -> int:
    """Return the number of KV heads.

    Null means as many as query heads. An absent key is an error, unless the reference class gives it that meaning too.
    """
    if options.holds("num_key_value_heads"):
        default = num_heads
    kv_heads = options.whole("num_key_value_heads", default)
    if num_heads % kv_heads:
        options.refuse(options.describe("num_key_value_heads"), f"a divisor of the {num_heads} query heads")
    return kv_heads


def read_experts(options: JsonOptions, *other_keys: str) -> dict[str, Any]:
    """Return the fields num_experts and num_experts_per_tok.

    other_keys: what the file may call num_local_experts, the usual one first
    """
    keys = (*other_keys, "num_local_experts")
    options.one_of(*keys)
    key = next((key for key in keys if options.value(key) is not None), keys[0])
    count, top_k = options.whole(key), options.whole("num_experts_per_tok")
    if top_k > count:
        options.refuse(options.describe("num_experts_per_tok"), f"at most {key}, {count}")
    return {"num_experts": count, "num_experts_per_tok": top_k}


def read_dense_layers(options: JsonOptions, num_layers: int) -> dict[str, Any]:
    """Return the fields dense_layers and dense_intermediate_size, as the Qwen families spell them.

    Every decoder_sparse_step-th layer has experts, but for those in mlp_only_layers.
    """
    only, step = options.wholes("mlp_only_layers"), options.whole("decoder_sparse_step", default=1)
    dense = tuple(n for n in range(num_layers) if n in only or (n + 1) % step)
    if len(dense) == num_layers:
        what = f"{options.describe('mlp_only_layers')} and {options.describe('decoder_sparse_step')}"
        options.refuse(what, f"values that leave experts in some of the {num_layers} layers")
    return {
        "dense_layers": dense,
        "dense_intermediate_size": options.whole("intermediate_size") if dense else 0,
    }


def read_dtype(options: JsonOptions, default: str | None) -> str:
    """Return the dtype of the weights, one of DTYPES but "auto". default: where no key names it"""
    dtype = options.one_of("dtype", "torch_dtype") or default
    if dtype not in DTYPES[1:]:
        key = "dtype" if options.value("dtype") is not None else "torch_dtype"
        options.refuse(options.describe(key), ", ".join(DTYPES[1:]))
    return str(dtype)


def read_rope(options: JsonOptions, head_dim: int, *, longrope: bool, yarn: bool = False) -> RopeConfig:
    """Read the rotary embedding.

    As published, rope_theta is next to rope_scaling (null or an object); transformers 5 puts both into rope_parameters.
    """
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
            # The reference uses these values unchanged, and computes no default if they are missing.
            short_mscale=rope.number("short_mscale"),
            long_mscale=rope.number("long_mscale"),
            original_max_position_embeddings=original.whole("original_max_position_embeddings"),
        )
    if kind == "yarn" and yarn:
        original = _in_either(options, rope, "original_max_position_embeddings")
        return read_yarn(rope, theta, head_dim, original.whole("original_max_position_embeddings"))
    if kind != "default":
        kinds = ["default", *(["longrope"] if longrope else []), *(["yarn"] if yarn else [])]
        options.refuse(f"{key}.rope_type (or type) is {kind!r}", " or ".join(kinds))
    return RopeConfig(theta, head_dim)


def _in_either(options: JsonOptions, rope: JsonOptions, key: str) -> JsonOptions:
    """Return the options that have the key: the rope object or the top level. Values in both must agree."""
    inside, outside = rope.value(key), options.value(key)
    if inside is not None and outside is not None and inside != outside:
        options.refuse(f"{options.describe(key)} and {rope.describe(key)}", "one value for both")
    return options if inside is None else rope
