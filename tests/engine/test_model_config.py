"""Tests of config.json as published and as transformers 5 writes it; each unsupported option is rejected by name."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from repository import CONFIGS

from moray.engine.checkpoint.config_fields import read_rope
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import ModelConfig, RopeConfig
from moray.engine.errors import CheckpointError
from moray.engine.json_options import JsonOptions

SHORT = [1.0 + 0.01 * i for i in range(64)]
LONG = [1.0 + i for i in range(64)]
MSCALE = 1.243163121016122

PHIMOE: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
    "initializer_range": 0.02, "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32064,
    "rope_scaling": {
        "type": "longrope", "short_factor": SHORT, "long_factor": LONG, "short_mscale": MSCALE, "long_mscale": MSCALE,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
PHIXTRAL: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"], "model_type": "phi-msft", "activation_function": "gelu_new", "attn_pdrop": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"}, "embd_pdrop": 0.0, "flash_attn": False,
    "flash_rotary": False, "fused_dense": False, "img_processor": None, "layer_norm_epsilon": 1e-05, "n_embd": 2560,
    "n_head": 32, "n_head_kv": None, "n_inner": None, "n_layer": 32, "n_positions": 2048, "num_experts_per_tok": 2,
    "num_local_experts": 4, "resid_pdrop": 0.1, "rotary_dim": 32, "tie_word_embeddings": False,
    "torch_dtype": "float16", "vocab_size": 51200,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(folder)


def refusal(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, config)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


def test_phi_3_5_moe_as_published(tmp_path: Path) -> None:
    rope = RopeConfig(10000.0, 128, tuple(SHORT), tuple(LONG), MSCALE, MSCALE, 4096)
    assert read(tmp_path, PHIMOE, {"eos_token_id": [32000, 32001, 32007]}) == ModelConfig(
        architecture="phimoe", vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, num_experts=16, num_experts_per_tok=2, max_position_embeddings=131072,
        norm_eps=1e-5, rope=rope, dtype="bfloat16", attention_bias=True, lm_head_bias=True, router_jitter=0.01,
        bos_token_id=1, eos_token_ids=(32000, 32001, 32007), generation_eos_token_ids=(32000, 32001, 32007),
    )  # fmt: skip


def test_phixtral_as_published(tmp_path: Path) -> None:
    assert read(tmp_path, PHIXTRAL) == ModelConfig(
        architecture="phi-msft", vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_layers=32,
        num_heads=32, num_kv_heads=32, head_dim=80, num_experts=4, num_experts_per_tok=2, max_position_embeddings=2048,
        norm_eps=1e-5, rope=RopeConfig(10000.0, 32), dtype="float16", attention_bias=True, lm_head_bias=True,
    )  # fmt: skip


def test_mixtral_as_published(tmp_path: Path) -> None:
    assert read(tmp_path, MIXTRAL) == ModelConfig(
        architecture="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, num_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
        norm_eps=1e-5, rope=RopeConfig(1e6, 128), dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


def published(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / name / "config.json").read_text()))


QWEN3, OLMOE = published("qwen3-30b-a3b"), published("olmoe-1b-7b")
QWEN2, GRANITE = published("qwen1.5-moe-a2.7b-chat"), published("granite-3.1-1b-a400m")
GPT_OSS = published("gpt-oss-20b")


def test_qwen3_30b_a3b_as_published(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3, {"eos_token_id": [151645, 151643]}) == ModelConfig(
        architecture="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=768, num_layers=48,
        num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=40960, norm_eps=1e-6, rope=RopeConfig(1e6, 128), dtype="bfloat16",
        bos_token_id=151643, eos_token_ids=(151645, 151643), generation_eos_token_ids=(151645, 151643),
    )  # fmt: skip


def test_olmoe_as_published(tmp_path: Path) -> None:
    assert read(tmp_path, OLMOE) == ModelConfig(
        architecture="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_layers=16, num_heads=16,
        num_kv_heads=16, head_dim=128, num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
        norm_eps=1e-5, rope=RopeConfig(1e4, 128), dtype="bfloat16", norm_topk_prob=False, eos_token_ids=(50279,),
    )  # fmt: skip


def test_qwen1_5_moe_as_published(tmp_path: Path) -> None:
    """The window is switched off, and q, k and v have biases although no key says so."""
    assert read(tmp_path, QWEN2) == ModelConfig(
        architecture="qwen2_moe", vocab_size=151936, hidden_size=2048, intermediate_size=1408, num_layers=24,
        num_heads=16, num_kv_heads=16, head_dim=128, num_experts=60, num_experts_per_tok=4,
        max_position_embeddings=8192, norm_eps=1e-6, rope=RopeConfig(1e6, 128), dtype="bfloat16", attention_bias=True,
        norm_topk_prob=False, shared_intermediate_size=5632, eos_token_ids=(151643,),
    )  # fmt: skip


def test_granite_1b_as_published(tmp_path: Path) -> None:
    assert read(tmp_path, GRANITE) == ModelConfig(
        architecture="granitemoe", vocab_size=49155, hidden_size=1024, intermediate_size=512, num_layers=24,
        num_heads=16, num_kv_heads=8, head_dim=64, num_experts=32, num_experts_per_tok=8,
        max_position_embeddings=131072, norm_eps=1e-6, rope=RopeConfig(1.5e6, 64), dtype="bfloat16",
        embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=6.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(0,),
    )  # fmt: skip


def test_gpt_oss_20b_as_published(tmp_path: Path) -> None:
    config = read(tmp_path, GPT_OSS, {"eos_token_id": [200002, 199999, 200012]})
    rope = read_rope(JsonOptions(GPT_OSS), 64, longrope=False, yarn=True)
    assert len(rope.short_factor) == 32 and rope.long_factor == ()
    assert config == ModelConfig(
        architecture="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_layers=24,
        num_heads=64, num_kv_heads=8, head_dim=64, num_experts=32, num_experts_per_tok=4,
        max_position_embeddings=131072, norm_eps=1e-5, rope=rope, dtype="bfloat16", attention_bias=True,
        sliding_window=128, full_layers=tuple(range(1, 24, 2)), norm_rounds_last=True, swiglu_limit=7.0,
        eos_token_ids=(200002, 199999, 200012), generation_eos_token_ids=(200002, 199999, 200012),
    )  # fmt: skip
    absent = ("layer_types", "torch_dtype", "swiglu_limit", "experts_per_token")
    without = {key: value for key, value in GPT_OSS.items() if key not in absent}
    assert read(tmp_path, without) == config, "the second, the fourth and so on attend to all keys"


def test_layers_with_and_without_a_window(tmp_path: Path) -> None:
    types = ["full_attention"] * 23 + ["sliding_attention"]
    assert read(tmp_path, GPT_OSS | {"layer_types": types}).full_layers == tuple(range(23))
    none = read(tmp_path, GPT_OSS | {"sliding_window": None})
    assert (none.sliding_window, none.full_layers) == (None, ())


def test_granite_3b(tmp_path: Path) -> None:
    """Forty experts are no power of two, and 1,536 is not either."""
    assert read(tmp_path, published("granite-3.1-3b-a800m")) == replace(
        read(tmp_path, GRANITE),
        hidden_size=1536, num_layers=32, num_heads=24, num_experts=40, rope=RopeConfig(1e7, 64),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "heads", "inner"), [("phi-mini-moe", (32, 8), 960), ("phi-tiny-moe", (16, 4), 448)])
def test_the_small_relatives_of_phi_3_5_moe(tmp_path: Path, name: str, heads: tuple[int, int], inner: int) -> None:
    assert read(tmp_path, published(name)) == ModelConfig(
        architecture="phimoe", vocab_size=32064, hidden_size=4096, intermediate_size=inner, num_layers=32,
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=128, num_experts=16, num_experts_per_tok=2,
        max_position_embeddings=4096, norm_eps=1e-5, rope=RopeConfig(1e4, 128), dtype="bfloat16", attention_bias=True,
        lm_head_bias=True, router_jitter=0.01,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        ({"mlp_only_layers": [0, 5]}, (0, 5)),
        ({"decoder_sparse_step": 2}, tuple(range(0, 48, 2))),
        ({"decoder_sparse_step": 24, "mlp_only_layers": [47]}, tuple(n for n in range(48) if n != 23)),
    ],
)
def test_dense_layers(tmp_path: Path, config: dict[str, Any], dense: tuple[int, ...]) -> None:
    read_config = read(tmp_path, QWEN3 | config)
    assert (read_config.dense_layers, read_config.dense_intermediate_size) == (dense, 6144)


def test_the_weights_of_experts_are_renormalised_only_if_the_config_says_so(tmp_path: Path) -> None:
    without = {key: value for key, value in QWEN3.items() if key != "norm_topk_prob"}
    assert not read(tmp_path, without).norm_topk_prob, "as the reference's class has it"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.Qwen3MoeConfig, QWEN3),
        (transformers.Qwen3MoeConfig, QWEN3 | {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
        (transformers.OlmoeConfig, OLMOE),
        (transformers.OlmoeConfig, OLMOE | {"clip_qkv": 8.0}),
        (transformers.Qwen2MoeConfig, QWEN2),
        (transformers.Qwen2MoeConfig, QWEN2 | {"qkv_bias": False}),
        (transformers.GraniteMoeConfig, GRANITE),
        (transformers.GraniteMoeConfig, GRANITE | {"tie_word_embeddings": False}),
        (transformers.GptOssConfig, GPT_OSS),
        (transformers.GptOssConfig, GPT_OSS | {"layer_types": None, "swiglu_limit": 5.0}),
        (
            transformers.PhimoeConfig,
            published("phi-tiny-moe") | {"sliding_window": None, "bos_token_id": 4, "eos_token_id": 5},
        ),
        (transformers.PhimoeConfig, PHIMOE),
        (transformers.PhimoeConfig, {**PHIMOE, "rope_scaling": None}),
        (transformers.MixtralConfig, MIXTRAL),
        (transformers.MixtralConfig, {**MIXTRAL, "sliding_window": 4096, "head_dim": 64}),
    ],
)
def test_what_transformers_saves_reads_the_same(tmp_path: Path, kind: Any, config: dict[str, Any]) -> None:
    published = read(tmp_path, config)
    copied = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})  # it is changed
    kind(**copied).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in saved and "torch_dtype" not in saved, "transformers 5 writes another spelling"
    assert read_model_config(tmp_path) == published


def test_head_dim_of_the_config_wins(tmp_path: Path) -> None:
    slim = {**PHIMOE, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "rope_scaling": None}
    config = read(tmp_path, slim)
    assert (config.head_dim, config.rope) == (128, RopeConfig(10000.0, 128))


@pytest.mark.parametrize(("window", "seen"), [(None, None), (131071, 131071), (131072, None), (2**20, None), (1, 1)])
def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, window: int | None, seen: int | None) -> None:
    assert read(tmp_path, {**PHIMOE, "sliding_window": window}).sliding_window == seen


def test_phimoe_jitter_defaults_to_the_references(tmp_path: Path) -> None:
    without = {key: value for key, value in PHIMOE.items() if key != "router_jitter_noise"}
    assert read(tmp_path, without).router_jitter == 0.01
    assert read(tmp_path, {**PHIMOE, "router_jitter_noise": 0.0}).router_jitter == 0.0


def test_mscales_of_each_length_stay_apart(tmp_path: Path) -> None:
    rope = read(tmp_path, {**PHIMOE, "rope_scaling": {**PHIMOE["rope_scaling"], "short_mscale": 1.1}}).rope
    assert (rope.short_mscale, rope.long_mscale) == (1.1, MSCALE)


@pytest.mark.parametrize("top", [None, 4096])
def test_original_length_stands_in_either_place(tmp_path: Path, top: int | None) -> None:
    inside = {key: value for key, value in PHIMOE["rope_scaling"].items() if top is None or not key.startswith("orig")}
    config = read(tmp_path, {**PHIMOE, "rope_scaling": inside, "original_max_position_embeddings": top})
    assert config.rope.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("own", "generation", "union"),
    [(2, None, (2,)), ([2, 5], {}, (2, 5)), (2, {"eos_token_id": [7, 2]}, (2, 7)), (None, {"eos_token_id": 3}, (3,))],
)
def test_stop_tokens_of_both_files(tmp_path: Path, own: object, generation: Any, union: tuple[int, ...]) -> None:
    assert read(tmp_path, {**MIXTRAL, "eos_token_id": own}, generation).eos_token_ids == union


def test_null_key_heads_are_as_many_as_query_heads(tmp_path: Path) -> None:
    assert read(tmp_path, {**MIXTRAL, "num_key_value_heads": None}).num_kv_heads == 32


def test_any_expert_counts(tmp_path: Path) -> None:
    config = read(tmp_path, {**MIXTRAL, "num_local_experts": 3, "num_experts_per_tok": 3})
    assert (config.num_experts, config.num_experts_per_tok) == (3, 3)


def scaled(**changes: object) -> dict[str, Any]:
    return {**PHIMOE, "rope_scaling": {**PHIMOE["rope_scaling"], **changes}}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**MIXTRAL, "hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({**PHIMOE, "hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'silu'"),
        ({**PHIXTRAL, "activation_function": "gelu"}, "activation_function is 'gelu'; supported: 'gelu_new'"),
        ({**MIXTRAL, "quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method is 'hqq'; "),
        ({**MIXTRAL, "quantization": {"bits": 4}}, "quantization is {'bits': 4}; supported: null"),
        ({**MIXTRAL, "tie_word_embeddings": True}, "tie_word_embeddings is True; supported: False"),
        ({**MIXTRAL, "residual_multiplier": 0.22}, "residual_multiplier is 0.22; supported: 1"),
        ({**MIXTRAL, "attention_bias": True}, "attention_bias is True; supported: False"),
        ({**MIXTRAL, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: at most num_local_experts, 8"),
        ({**PHIMOE, "num_experts_per_tok": 1}, "num_experts_per_tok is 1; supported: 2 (sparsemixer"),
        ({**MIXTRAL, "num_attention_heads": 30}, "hidden_size is 4096 and num_attention_heads is 30"),
        ({**MIXTRAL, "head_dim": 65}, "the size of a head is 65; supported: an even number"),
        ({**MIXTRAL, "num_key_value_heads": 5}, "num_key_value_heads is 5; supported: a divisor of the 32 query heads"),
        ({**MIXTRAL, "sliding_window": 0}, "sliding_window is 0; supported: a whole number, 1 or more"),
        ({**MIXTRAL, "vocab_size": "32000"}, "vocab_size is '32000'; supported: a whole number"),
        ({**MIXTRAL, "num_hidden_layers": True}, "num_hidden_layers is True; supported: a whole number"),
        ({**MIXTRAL, "torch_dtype": "float64"}, "torch_dtype is 'float64'; supported: float32, float16, bfloat16"),
        ({**MIXTRAL, "torch_dtype": None}, "torch_dtype is missing"),
        ({**MIXTRAL, "dtype": "float16"}, "dtype is 'float16' and torch_dtype is 'bfloat16'; supported: one value"),
        ({**MIXTRAL, "eos_token_id": "</s>"}, "eos_token_id is '</s>'; supported: a token id or a list"),
        ({**MIXTRAL, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan; supported: a number above 0"),
        ({**MIXTRAL, "rope_theta": None}, "rope_theta is missing"),
        ({**MIXTRAL, "rope_scaling": {"type": "linear", "factor": 2.0}}, "is 'linear'; supported: default"),
        ({**MIXTRAL, "rope_scaling": {"rope_type": "longrope"}}, "is 'longrope'; supported: default"),
        ({**PHIMOE, "rope_scaling": {"rope_type": "yarn"}}, "is 'yarn'; supported: default or longrope"),
        ({**PHIMOE, "rope_scaling": "longrope"}, "rope_scaling is 'longrope'; supported: an object"),
        (scaled(short_factor=[1.0] * 48), "rope_scaling.short_factor has 48 entries; supported: a list of 64"),
        (scaled(long_factor=None), "rope_scaling.long_factor is missing"),
        (scaled(long_factor=[0.0] * 64), "rope_scaling.long_factor"),
        (scaled(short_mscale=None), "rope_scaling.short_mscale is missing"),
        (scaled(long_mscale=None), "rope_scaling.long_mscale is missing"),
        (scaled(rope_type="yarn"), "rope_scaling.rope_type is 'yarn' and rope_scaling.type is 'longrope'"),
        (scaled(rope_theta=1e6), "rope_theta is 10000.0 and rope_scaling.rope_theta is 1000000.0"),
        (scaled(original_max_position_embeddings=2048), "is 4096 and rope_scaling.original_max_position_embeddings is"),
        (scaled(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor is 0.5"),
        ({**PHIMOE, "rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling are both there"),
        ({**PHIXTRAL, "num_local_experts": None}, "num_local_experts is missing; supported: 2 or more (dense Phi-2"),
        ({**PHIXTRAL, "num_local_experts": 1}, "num_local_experts is 1; supported: 2 or more"),
        ({**PHIXTRAL, "rotary_dim": 31}, "rotary_dim is 31; supported: an even number up to the head's size, 80"),
        ({**PHIXTRAL, "rotary_dim": 82}, "rotary_dim is 82"),
        ({**PHIXTRAL, "rope_theta": 1e6}, "rope_theta is 1000000.0; supported: 10000.0"),
        ({**PHIXTRAL, "rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}; supported: null"),
        ({**PHIXTRAL, "n_head": None}, "n_head is missing"),
        ({**QWEN3, "use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ({**QWEN2, "use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sl"),
        ({**MIXTRAL, "layer_types": ["full_attention"]}, "layer_types is ['full_attention']; supported: null"),
        ({**QWEN3, "mlp_only_layers": [-1]}, "mlp_only_layers is [-1]; supported: a list of whole numbers, 0 or more"),
        ({**QWEN3, "decoder_sparse_step": 49}, "supported: values that leave experts in some of the 48 layers"),
        ({**QWEN3, "num_experts_per_tok": 129}, "num_experts_per_tok is 129; supported: at most num_experts, 128"),
        ({**QWEN3, "num_local_experts": 64}, "num_experts is 128 and num_local_experts is 64; supported: one value"),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({**OLMOE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type (or type) is 'yarn'"),
        ({**QWEN3, "attention_bias": True}, "attention_bias is True; supported: False"),
        ({**QWEN3, "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64; supported: 0"),
        ({**OLMOE, "clip_qkv": -1.0}, "clip_qkv is -1.0; supported: a number above 0"),
        ({**OLMOE, "tie_word_embeddings": True}, "tie_word_embeddings is True; supported: False"),
        ({**GRANITE, "logits_scaling": 0}, "logits_scaling is 0; supported: a number above 0"),
        ({**GRANITE, "sliding_window": 128}, "sliding_window is 128; supported: null"),
        ({**GPT_OSS, "layer_types": ["full_attention"] * 23}, "layer_types has 23 entries; supported: one for each of"),
        ({**GPT_OSS, "layer_types": ["linear_attention"] * 24}, "supported: 'sliding_attention' or 'full_attention'"),
        ({**GPT_OSS, "swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; supported: 1.702"),
        ({**GPT_OSS, "experts_per_token": 2}, "num_experts_per_tok is 4 and experts_per_token is 2; supported: one"),
        ({**GPT_OSS, "torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({**MIXTRAL, "model_type": "llama"}, "model_type is 'llama'; supported: phimoe, phi-msft, mixtral"),
        ({}, "model_type is None"),
    ],
)
def test_refused_by_name(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    assert named in refusal(tmp_path, config)


REQUIRED = {
    "mixtral": (MIXTRAL, "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps "
                "num_key_value_heads num_local_experts num_experts_per_tok max_position_embeddings rope_theta"),
    "qwen3_moe": (QWEN3, "vocab_size moe_intermediate_size num_experts num_experts_per_tok num_key_value_heads"),
    "qwen2_moe": (QWEN2, "moe_intermediate_size shared_expert_intermediate_size num_experts rope_theta"),
    "gpt_oss": (GPT_OSS, "intermediate_size num_local_experts num_experts_per_tok rope_theta"),
    "phi-msft": (PHIXTRAL, "vocab_size n_embd n_layer n_head n_positions layer_norm_epsilon rotary_dim "
                 "num_local_experts num_experts_per_tok"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "key"), [(config, key) for config, keys in REQUIRED.values() for key in keys.split()]
)
def test_no_shape_is_guessed(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    without = {name: value for name, value in config.items() if name != key}
    assert f"{key} is missing" in refusal(tmp_path, without)


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**MIXTRAL, "hidden_act": "gelu", "vocab_size": 0, "logits_scaling": 8.0})
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe", "is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git-lfs pointer"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_model_config(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_model_config(tmp_path)


def test_a_bad_stop_token_of_the_generation_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is -1"):
        read(tmp_path, MIXTRAL, {"eos_token_id": -1})
