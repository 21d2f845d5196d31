"""Tests of whole models that are published quantized: against transformers on the weights that the codes stand for,
and against the same codes made on load."""

import json
import logging
import re
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from published_checkpoints import CONFIGS, is_coded, publish
from safetensors.torch import load_file, save_file
from tiny_checkpoints import MIXTRAL, PHIMOE, PHIXTRAL, QWEN2_MOE, QWEN3_MOE, Reference, write
from torch import Tensor

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.weight_sizes import measure_weights
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.errors import CheckpointError
from moray.engine.params import SamplingParams
from moray.engine.quantization.on_load import quantize
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.request import Request
from moray.engine.runner.loader import load_model
from moray.engine.runner.model_runner import ModelRunner

TOKENS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0)).tolist()
WORDS, ELEMENTS = "compressed-tensors-words-int4-group", "compressed-tensors-elements-int8-channel"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose widths the groups divide."""
    root = tmp_path_factory.mktemp("plain")
    wide = (
        PHIMOE | {"intermediate_size": 64},
        MIXTRAL | {"intermediate_size": 64},
        PHIXTRAL | {"n_embd": 64},
        QWEN3_MOE | {"moe_intermediate_size": 64},
        QWEN2_MOE | {"moe_intermediate_size": 64},
    )
    return {config["model_type"]: write(root / config["model_type"], config) for config in wide}


def logits(folder: Path, kind: OnLoadKind | None = None) -> Tensor:
    config = with_quantization(read_model_config(folder), kind, str(folder))
    runner = ModelRunner(load_model(folder, config, torch.float32), config, torch.float32, block_size=16)
    runner.allocate_cache(4)
    seq = Sequence(0, Request("r", TOKENS, SamplingParams()))
    seq.rope_set = int(len(TOKENS) > PHIMOE["original_max_position_embeddings"])
    seq.block_table = array("i", range(4))
    return runner.compute_logits(runner.run([Scheduled(seq, len(TOKENS))]), range(len(TOKENS))).float()


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a checkpoint by what `change` makes of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "case"),
    [(("phimoe", "mixtral")[i % 2], case) for i, case in enumerate(CONFIGS)]
    + [("phi-msft", ELEMENTS), ("phi-msft", WORDS), ("mixtral", "awq"), ("phimoe", "gptq-int4")]
    + [("qwen3_moe", "compressed-tensors-elements-fp8-block"), ("qwen2_moe", WORDS)],
)
def test_answers_are_those_of_the_reference_on_the_weights_that_the_codes_stand_for(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, case: str
) -> None:
    published, exact = publish(checkpoints[architecture], tmp_path, case)
    torch.testing.assert_close(logits(published), Reference(exact).logits(TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["phimoe", "phi-msft"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_published_codes_answer_bit_by_bit_as_the_same_codes_made_on_load(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: OnLoadKind
) -> None:
    plain = checkpoints[architecture]
    scheme = with_quantization(read_model_config(plain), kind, "").quantization
    assert scheme is not None
    stored = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if is_coded(name, tensor):
            weight = quantize(tensor, kind, scheme.group_size)
            stored |= {name: weight.codes, f"{name}_scale": weight.scales}
        else:
            stored[name] = tensor
    strategy = {"strategy": "channel"} if scheme.group_size is None else {"group_size": scheme.group_size}
    weights = {"num_bits": 4 if kind == "int4" else 8, "type": "float" if kind == "fp8" else "int", **strategy}
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "lm_head.linear", r"re:.*\.gate"],
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(tmp_path), logits(plain, kind))


def test_names_of_modules_as_transformers_calls_them_are_read_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """llm-compressor 0.14 stores Phi's experts under transformers 5's names, and its router under both."""
    published, _ = publish(checkpoints["phimoe"], tmp_path / "with", WORDS, ignore=["lm_head", r"re:.*\.router"])
    expected = logits(published)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                name = name.replace(f".{ours}.", f".{theirs}.")
            renamed[name] = tensor
        return renamed

    rewrite(published, rename)
    assert torch.equal(logits(published), expected)


def test_a_layer_that_is_left_out_whole_stays_as_it_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    published, exact = publish(
        checkpoints["mixtral"],
        tmp_path,
        WORDS,
        choose=lambda name, tensor: is_coded(name, tensor) and "layers.0.self_attn" not in name,
        ignore=["lm_head", r"re:.*\.gate", r"re:model\.layers\.0\.self_attn"],
    )
    torch.testing.assert_close(logits(published), Reference(exact).logits(TOKENS), atol=1e-4, rtol=0)


def test_a_head_and_a_router_may_be_quantized(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    published, exact = publish(
        checkpoints["mixtral"],
        tmp_path,
        ELEMENTS,
        choose=lambda name, tensor: tensor.dim() == 2 and "embed" not in name,
        ignore=[],
    )
    torch.testing.assert_close(logits(published), Reference(exact).logits(TOKENS), atol=1e-4, rtol=0)


def test_activations_and_cache_keep_the_models_dtype_and_the_log_says_so(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published, _ = publish(
        checkpoints["mixtral"], tmp_path, "compressed-tensors-elements-fp8-tensor", kv_cache_scheme={"num_bits": 8}
    )
    expected = logits(published)
    attention = "model.layers.1.self_attn"
    extras = {f"{attention}.{name}": torch.ones(1) for name in ("q_proj.input_scale", "k_scale", "v_scale")}
    rewrite(published, lambda tensors: tensors | extras)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(published), expected)
    assert [message.removeprefix(f"{published}: ") for message in caplog.messages] == [
        "activations are not quantized as the checkpoint says: they keep the model's dtype",
        "the KV cache is not quantized as kv_cache_scheme says: it keeps the model's dtype",
    ]


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        logits(folder)
    return str(error.value)


def test_every_problem_of_the_files_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    published, _ = publish(checkpoints["mixtral"], tmp_path, WORDS)
    q, expert = "model.layers.0.self_attn.q_proj", "model.layers.1.block_sparse_moe.experts.3.w2"

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[f"{expert}.weight_scale"]
        tensors[f"{q}.weight_packed"] = tensors[f"{q}.weight_packed"][:, :7].contiguous()
        tensors[f"{q}.weight_g_idx"] = torch.zeros(64).int()
        tensors[f"{q}.weight_scale"] = tensors[f"{q}.weight_scale"].double()
        return tensors

    rewrite(published, damage)
    assert refusal(published).splitlines()[1:] == [
        f"Missing: {expert}.weight_scale.",
        f"Not of this model: {q}.weight_g_idx.",
        f"Of another shape: {q}.weight_packed [64, 7], must be [64, 8].",
        f"Of a dtype other than F32, F16, BF16: {q}.weight_scale F64.",
    ]


def test_parts_of_one_matrix_must_all_be_quantized(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    q = "model.layers.1.self_attn.q_proj"
    published, _ = publish(
        checkpoints["mixtral"],
        tmp_path,
        WORDS,
        choose=lambda name, tensor: is_coded(name, tensor) and name != f"{q}.weight",
        ignore=["lm_head", r"re:.*\.gate", q],
    )
    assert re.fullmatch(rf"{q}\.weight is not quantized, but .*k_proj is.*", refusal(published))


def test_permuted_inputs_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    published, _ = publish(checkpoints["mixtral"], tmp_path, "gptq-int4", desc_act=True, static_groups=True)
    logits(published)
    name = "model.layers.1.self_attn.o_proj.g_idx"
    rewrite(published, lambda tensors: tensors | {name: tensors[name].flip(0)})
    assert refusal(published).startswith(f"{name} permutes the inputs (desc_act)")


def test_biases_of_zeros_that_older_programs_store_are_read_over(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    published, _ = publish(checkpoints["mixtral"], tmp_path, "gptq-int4")
    expected = logits(published)
    name = "model.layers.1.self_attn.o_proj.bias"
    rewrite(published, lambda tensors: tensors | {name: torch.zeros(64).half()})
    assert torch.equal(logits(published), expected)
    rewrite(published, lambda tensors: tensors | {name: torch.ones(64).half()})
    assert refusal(published) == f"{name} is not 0, but the model has no bias there."


@pytest.mark.parametrize("case", CONFIGS)
def test_a_plan_counts_parameters_and_bytes_from_headers(
    checkpoints: dict[str, Path], tmp_path: Path, case: str
) -> None:
    published, exact = publish(checkpoints["phimoe"], tmp_path, case)
    one = "model.layers.1.self_attn.q_proj.input_scale"
    rewrite(published, lambda tensors: tensors | {one: torch.ones(1)})
    config = read_model_config(published)
    found = measure_weights(Checkpoint(published).tensors, config, 2)
    tensors = load_file(exact / "model.safetensors")
    assert found.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    coded = {name: tensor.shape for name, tensor in tensors.items() if is_coded(name, tensor)}
    assert config.quantization is not None
    plain = sum(tensor.numel() for name, tensor in tensors.items() if name not in coded)
    assert found.num_bytes == 2 * plain + sum(config.quantization.weight_bytes(*shape) for shape in coded.values())
