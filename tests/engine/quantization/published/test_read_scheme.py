"""Tests of how quantization_config is read: which modules are quantized and how, and what is refused by name."""

from typing import Any

import pytest
from published_checkpoints import CONFIGS

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.published import read_scheme
from moray.engine.quantization.scheme import Scheme

ATTENTION, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.3.block_sparse_moe.experts.12.w2"
KINDS = "int and 4, int and 8, float and 8"
ROUTER, HEAD, EMBEDDING = "model.layers.0.block_sparse_moe.gate", "lm_head", "model.embed_tokens"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A config as llm-compressor 0.14 writes it."""
    group = {"targets": ["Linear"], "weights": INT4 | (weights or {}), "input_activations": None,
             "output_activations": None, "format": "pack-quantized"}  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
        "kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
        "moe_sparsity_config": None, "version": "0.20.1", **changes,
    }  # fmt: skip


GPTQ: dict[str, Any] = CONFIGS["gptq-int4"] | {"group_size": 128}
AWQ: dict[str, Any] = CONFIGS["awq"] | {"group_size": 128}
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "*.gate"]}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
          "modules_to_not_convert": ["lm_head", "model.layers.0.block_sparse_moe.gate"]}  # fmt: skip


def read(config: dict[str, Any], key: str = "quantization_config") -> tuple[Scheme | None, list[str]]:
    options = JsonOptions({key: config})
    return read_scheme(options, FAMILIES["phimoe"].names), options.problems


def accepted(config: dict[str, Any], key: str = "quantization_config") -> Scheme:
    scheme, problems = read(config, key)
    assert problems == [] and scheme is not None
    return scheme


def refused(config: dict[str, Any]) -> str:
    return "\n".join(problem.removeprefix("quantization_config.") for problem in read(config)[1])


def group(**changes: Any) -> dict[str, Any]:
    """The config with other keys in its group."""
    return compressed(config_groups={"group_0": compressed()["config_groups"]["group_0"] | changes})


def facts(scheme: Scheme) -> tuple[Any, ...]:
    return scheme.kind, scheme.group_size, scheme.symmetric, scheme.block_rows, scheme.is_per_tensor, scheme.layout


def test_a_config_without_quantization_has_no_scheme() -> None:
    assert read({})[0] is None and read({}, "compression_config")[0] is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (compressed(), ("int4", 128, True, 1, False, "words")),
        (compressed({"symmetric": False}), ("int4", 128, False, 1, False, "words")),
        (
            compressed({"num_bits": 8, "strategy": "channel", "group_size": None}),
            ("int8", None, True, 1, False, "words"),
        ),
        (compressed({"strategy": None, "group_size": -1}), ("int4", None, True, 1, False, "words")),
        (
            group(weights=INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}, format="int-quantized"),
            ("int8", None, True, 1, False, "elements"),
        ),
        (
            group(weights={"num_bits": 8, "type": "float", "strategy": "tensor"}, format="float-quantized"),
            ("fp8", None, True, 1, True, "elements"),
        ),
        (
            group(
                weights={"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]},
                format="float-quantized",
            ),
            ("fp8", 64, True, 128, False, "elements"),
        ),
        (FP8, ("fp8", None, True, 1, True, "elements")),
        (BLOCKS, ("fp8", 128, True, 128, False, "elements")),
        (GPTQ, ("int4", 128, True, 1, False, "gptq")),
        (GPTQ | {"bits": 8, "group_size": -1, "sym": False}, ("int8", None, False, 1, False, "gptq")),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, ("int4", 128, True, 1, False, "gptq_v2")),
        (AWQ, ("int4", 128, False, 1, False, "awq")),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
            ("int4", 64, False, 1, False, "awq"),
        ),
    ],
)
def test_what_a_config_says_of_codes_and_scales(config: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert facts(accepted(config)) == expected


@pytest.mark.parametrize("config", [compressed(), FP8, BLOCKS, GPTQ, AWQ])
def test_attention_and_experts_are_quantized_and_no_routers_heads_and_embeddings(config: dict[str, Any]) -> None:
    scheme = accepted(config)
    names = (ATTENTION, EXPERT, ROUTER, HEAD, EMBEDDING)
    assert [scheme.quantizes(name) for name in names] == [True, True, False, False, False]


def test_older_key_and_groups_that_are_alike() -> None:
    first = compressed()["config_groups"]["group_0"]
    config = compressed(
        config_groups={"group_0": first | {"targets": [r"re:.*self_attn\."]}, "group_1": first | {"targets": [EXPERT]}},
        ignore=[ATTENTION],
    )
    scheme = accepted(config, "compression_config")
    key = ATTENTION.replace("q_proj", "k_proj")
    assert [scheme.quantizes(name) for name in (ATTENTION, key, EXPERT, ROUTER, HEAD)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_group_without_weights_is_no_reason_to_refuse() -> None:
    """It quantizes attention itself, which stays in the model's dtype."""
    groups = compressed()["config_groups"] | {"group_1": {"targets": ["MixtralAttention"], "weights": None}}
    assert facts(accepted(compressed(config_groups=groups))) == facts(accepted(compressed()))


def test_modules_are_named_from_either_end() -> None:
    scheme = accepted(BLOCKS | {"modules_to_not_convert": ["gate", "model.layers.0", "lm_head"]})
    for name in (ROUTER, ATTENTION, HEAD, "model.layers.7.block_sparse_moe.gate"):
        assert not scheme.quantizes(name)
    assert scheme.quantizes(EXPERT) and scheme.quantizes(ATTENTION.replace("layers.0", "layers.01"))
    assert not accepted(AWQ | {"modules_to_not_convert": ["self_attn"]}).quantizes(ATTENTION)


def test_gptq_names_what_it_quantizes_and_what_it_does_not() -> None:
    some = GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["self_attn.o_proj"]]}
    assert accepted(some).quantizes(ATTENTION) and not accepted(some).quantizes(EXPERT)
    flat = GPTQ | {"modules_in_block_to_quantize": [ATTENTION]}
    assert accepted(flat).quantizes(ATTENTION) and not accepted(flat).quantizes(EXPERT)
    without = GPTQ | {"dynamic": {r"-:.*self_attn": {}}, "lm_head": True}
    scheme = accepted(without)
    assert not scheme.quantizes(ATTENTION) and scheme.quantizes(EXPERT) and scheme.quantizes(HEAD)


def test_activations_are_named_in_notes() -> None:
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = group(weights=fp8, input_activations=activations, format="float-quantized")
    assert [note.split(" not ")[0] for note in accepted(config).notes] == ["activations are"]
    assert accepted(compressed()).notes == ()
    assert len(accepted(FP8).notes) == 1


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "hqq", "quanto", "torchao", "quark", None])
def test_other_methods_are_refused_with_what_to_do(method: str | None) -> None:
    _, problems = read({"quant_method": method, "load_in_4bit": True})
    what = "is missing" if method is None else f"is {method!r}"
    assert problems == [
        f"quantization_config.quant_method {what}; supported: compressed-tensors, fp8, gptq, awq, mxfp4 (or the model "
        "in bfloat16 or float16, with model.quantization)"
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed(rotation=1), "rotation is 1; supported: null"),
        (compressed(transform_config={"version": 1}), "transform_config is {'version': 1}; supported: {}"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}),
         "sparsity_config.format is 'sparse-24-bitmask'; supported: 'dense'"),
        (compressed(config_groups={}), "config_groups is {}; supported: a group with weights and targets"),
        (compressed(config_groups={"W4A16": ["Linear"]}),
         "config_groups.W4A16 is ['Linear']; supported: an object\n"
         "config_groups is {'W4A16': ['Linear']}; supported: a group with weights and targets"),
        (compressed(ignore=["re:(gate"]),
         "ignore has '(?:(gate).*' (missing ), unterminated subpattern at position 0); supported: regular expressions "
         "after re:"),
        (compressed({"num_bits": 3}),
         f"config_groups.group_0.weights.type and num_bits are int and 3; supported: {KINDS}"),
        (compressed({"type": "float"}),
         f"config_groups.group_0.weights.type and num_bits are float and 4; supported: {KINDS}"),
        (compressed({"actorder": "group"}),
         "config_groups.group_0.weights.actorder is 'group'; supported: False or 'weight' or 'static'"),
        (compressed({"strategy": "tensor_group"}),
         "config_groups.group_0.weights.strategy is 'tensor_group'; supported: tensor, channel, group, block"),
        (compressed({"strategy": "tensor", "symmetric": False}),
         "config_groups.group_0.weights.symmetric is False; supported: true, or integers per channel or group"),
        (compressed({"scale_dtype": "torch.uint8"}),
         "config_groups.group_0.weights.scale_dtype is 'torch.uint8'; supported: 'torch.float32' or 'torch.float16' "
         "or 'torch.bfloat16'"),
        (compressed({"skew": 2}), "config_groups.group_0.weights.skew is 2; supported: null"),
        (group(input_activations={"num_bits": 4}),
         "config_groups.group_0.input_activations.num_bits is 4; supported: 8 or 16"),
        (group(targets=["Embedding"]),
         "config_groups.group_0.targets is ['Embedding']; supported: Linear, names of linear modules, and re: with an "
         "expression"),
        (group(format="marlin-24"),
         "config_groups.group_0.format is 'marlin-24'; supported: 'pack-quantized' or 'int-quantized' or "
         "'float-quantized' or 'naive-quantized'"),
        (group(format="nvfp4-pack-quantized", weights={"num_bits": 4, "type": "float", "group_size": 16}),
         f"config_groups.group_0.weights.type and num_bits are float and 4; supported: {KINDS}\n"
         "config_groups.group_0.format is 'nvfp4-pack-quantized'; supported: 'pack-quantized' or 'int-quantized' or "
         "'float-quantized' or 'naive-quantized'"),
        (compressed({"group_size": 12}), "quantization_config has groups of 12 inputs; supported: multiples of 8"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: 'e4m3' or 'float8_e4m3fn'"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'; supported: 'fp8'"),
        (FP8 | {"weight_block_size": [1]}, "weight_block_size is [1]; supported: a list of 2 whole numbers above 0"),
        (FP8 | {"ignored_layers": "lm_head"}, "ignored_layers is 'lm_head'; supported: a list of strings"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 4 or 8"),
        (GPTQ | {"bits": None, "group_size": None},
         "bits is missing; supported: 4 or 8\ngroup_size is missing; supported: a whole number, 1 or more"),
        (GPTQ | {"desc_act": True},
         "desc_act is True with groups of 128 inputs; supported: desc_act false, or a group_size of -1"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True; supported: False"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: 'gptq' or 'gptq_v2'"),
        (GPTQ | {"dynamic": {"+:.*w1": {"bits": 8}}},
         "dynamic is {'+:.*w1': {'bits': 8}}; supported: rules that begin with -: (modules that are not quantized)"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'; supported: 'int32'"),
        (GPTQ | {"rotation": "hadamard"}, "rotation is 'hadamard'; supported: null"),
        (AWQ | {"version": "gemv_fast"}, "version is 'gemv_fast'; supported: gemm"),
        (AWQ | {"version": "marlin"}, "version is 'marlin'; supported: gemm"),
        (AWQ | {"zero_point": False}, "zero_point is False; supported: True"),
        (AWQ | {"bits": 8}, "bits is 8; supported: 4"),
        (AWQ | {"backend": "llm-awq"},
         "backend is 'llm-awq'; supported: autoawq, which packs weights in another order"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    assert refused(config) == message


def test_groups_that_differ_are_refused() -> None:
    first = compressed()["config_groups"]["group_0"]
    config = compressed(
        config_groups={
            "group_0": first | {"targets": ["re:.*w1"]},
            "group_1": first | {"targets": ["re:.*w2"], "weights": INT4 | {"num_bits": 8}},
        }
    )
    assert read(config)[1] == [
        "quantization_config.config_groups.group_1 and quantization_config.config_groups.group_0 quantize weights "
        "differently; supported: one way for all weights of a model"
    ]


def test_two_configs_must_agree() -> None:
    options = JsonOptions({"quantization_config": GPTQ, "compression_config": AWQ})
    read_scheme(options, FAMILIES["phimoe"].names)
    assert options.problems[0].endswith("; supported: one value for both")
