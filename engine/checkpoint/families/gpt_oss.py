"""The config of gpt-oss."""

from typing import Any

from moray.engine.checkpoint.config_fields import read_experts, read_kv_heads, read_rope
from moray.engine.checkpoint.families.family import Family, Stack
from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames

WINDOW, FULL = "sliding_attention", "full_attention"


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    options.expect("hidden_act", "silu")
    options.expect("swiglu_alpha", 1.702)
    options.expect("attention_bias", True, False)
    options.one_of("num_experts_per_tok", "experts_per_token")
    return ModelConfig(
        **shared,
        **read_experts(options),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=read_kv_heads(options, shared["num_heads"]),
        rope=read_rope(options, shared["head_dim"], longrope=False, yarn=True),
        attention_bias=options.value("attention_bias") is not False,
        full_layers=_read_full_layers(options, shared["num_layers"]) if shared["sliding_window"] else (),
        norm_rounds_last=True,
        swiglu_limit=options.number("swiglu_limit", default=7.0),
    )


def _read_full_layers(options: JsonOptions, num_layers: int) -> tuple[int, ...]:
    """Return the layers without a window: the second, the fourth and so on, unless layer_types says otherwise."""
    types = options.texts("layer_types") or (WINDOW, FULL) * num_layers
    if set(types) - {WINDOW, FULL}:
        options.refuse(options.describe("layer_types"), f"{WINDOW!r} or {FULL!r} for every layer")
    elif options.value("layer_types") is not None and len(types) != num_layers:
        options.refuse(f"layer_types has {len(types)} entries", f"one for each of the {num_layers} layers")
    return tuple(n for n, kind in enumerate(types[:num_layers]) if kind == FULL)


MATRICES = MatrixNames(
    r"model\.embed_tokens",
    r".*\.router",
    "lm_head",
    (r"(.*\.self_attn)\.[qkv]_proj", r"(.*\.experts)\.\d+\.(?:gate|up|down)_proj"),
)
PARTS = ("blocks", "scales")
EXPERTS = r"(.*\.mlp\.experts)\."
STACKS = (
    Stack(EXPERTS + "gate_up_proj", (r"\1.{}.gate_proj.weight", r"\1.{}.up_proj.weight"), are_columns=True),
    Stack(EXPERTS + "gate_up_proj_bias", (r"\1.{}.gate_proj.bias", r"\1.{}.up_proj.bias")),
    Stack(EXPERTS + "down_proj", (r"\1.{}.down_proj.weight",), are_columns=True),
    Stack(EXPERTS + "down_proj_bias", (r"\1.{}.down_proj.bias",)),
    # of a checkpoint in MXFP4
    *(Stack(EXPERTS + f"gate_up_proj_{p}", (rf"\1.{{}}.gate_proj.{p}", rf"\1.{{}}.up_proj.{p}")) for p in PARTS),
    *(Stack(EXPERTS + f"down_proj_{p}", (rf"\1.{{}}.down_proj.{p}",)) for p in PARTS),
)
GPT_OSS = Family(_read, MATRICES, reads=("layer_types",), dtype="bfloat16", stacks=STACKS)
