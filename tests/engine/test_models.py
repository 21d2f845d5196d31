"""Tests of all families in fp32 against transformers, and of the ways to be silently wrong."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import Model, tokens
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    FAMILIES,
    FIRST_FAMILIES,
    GRANITEMOE,
    MIXTRAL,
    OLMOE,
    PHIMOE,
    PHIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    Reference,
    write,
)

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.runner.loader import load_model

ORIGINAL = PHIMOE["original_max_position_embeddings"]
BOUNDARY_LENGTHS = [1, 2, 15, 16, 17, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL, 100]


def assert_parity(folder: Path, lengths: list[int]) -> None:
    model, reference = Model(folder), Reference(folder)
    for n in lengths:
        token_ids = tokens(n)
        torch.testing.assert_close(model.logits(token_ids), reference.logits(token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_equal_the_reference_on_both_sides_of_every_boundary(
    checkpoints: dict[str, Path], architecture: str
) -> None:
    assert_parity(checkpoints[architecture], BOUNDARY_LENGTHS)


@pytest.mark.parametrize("architecture", FIRST_FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_give_the_logits_of_one_pass(checkpoints: dict[str, Path], architecture: str, chunk: int) -> None:
    model, token_ids = Model(checkpoints[architecture]), tokens(70)
    torch.testing.assert_close(model.logits(token_ids, chunk), model.logits(token_ids), atol=1e-4, rtol=0)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({**without(PHIMOE, "original_max_position_embeddings"), "rope_scaling": None}, id="default-rope"),
        pytest.param({**PHIMOE, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}, id="head_dim"),
        pytest.param({**PHIMOE, "attention_bias": False, "lm_head_bias": False}, id="no-biases"),
        pytest.param({**PHIMOE, "sliding_window": 9}, id="phimoe-window"),
        pytest.param({**MIXTRAL, "sliding_window": 9}, id="mixtral-window"),
        pytest.param({**MIXTRAL, "sliding_window": 1}, id="window-of-itself"),
        pytest.param({**MIXTRAL, "num_experts_per_tok": 1}, id="top-1"),
        pytest.param({**MIXTRAL, "num_experts_per_tok": 3}, id="top-3"),
        pytest.param({**MIXTRAL, "num_local_experts": 2}, id="top-k-is-all"),
        pytest.param({**MIXTRAL, "num_key_value_heads": 4}, id="no-gqa"),
        pytest.param({**QWEN3_MOE, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8}, id="8-of-128"),
        pytest.param(
            {
                **QWEN3_MOE,
                "norm_topk_prob": False,
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [3],
            },
            id="qwen3-dense-layers",
        ),
        pytest.param({**GRANITEMOE, "tie_word_embeddings": False}, id="granite-untied"),
        pytest.param({**OLMOE, "clip_qkv": 0.7, "num_key_value_heads": 2}, id="olmoe-clip"),
        pytest.param({**OLMOE, "norm_topk_prob": True}, id="olmoe-renormalised"),
        pytest.param({**QWEN2_MOE, "qkv_bias": False, "mlp_only_layers": [0]}, id="qwen2-no-bias-dense-layer"),
        pytest.param({**PHIXTRAL, "num_local_experts": 2}, id="phixtral-2x2"),
        pytest.param({**PHIXTRAL, "num_experts_per_tok": 3, "n_inner": 100}, id="phixtral-top-3"),
        pytest.param({**PHIXTRAL, "n_embd": 160, "n_head": 2, "rotary_dim": 32}, id="phixtral-head-of-80"),
    ],
)
def test_variants_equal_the_reference(tmp_path: Path, config: dict[str, Any]) -> None:
    assert_parity(write(tmp_path, config), [1, 10, 33, 60])


def test_mscale_is_the_configs_at_every_length_and_on_cos_and_sin(checkpoints: dict[str, Path]) -> None:
    """1.243 is neither 1 nor the formula's value; long_mscale differs from it, so that a mix-up shows."""
    rotary = load_model(
        checkpoints["phimoe"], read_model_config(checkpoints["phimoe"]), torch.float32
    ).rotary  # fmt: skip
    positions = torch.tensor([0, 0, 3, 3])
    cos, sin = rotary(positions, torch.tensor([0, 1, 0, 1]))
    assert cos[0].tolist() == pytest.approx([1.243] * 8) and cos[1].tolist() == pytest.approx([1.4] * 8)
    length = (cos**2 + sin**2).sqrt()
    assert length[2].tolist() == pytest.approx([1.243] * 8) and length[3].tolist() == pytest.approx([1.4] * 8)


def test_rope_tables_are_fp32_whatever_the_models_dtype(checkpoints: dict[str, Path]) -> None:
    config = read_model_config(checkpoints["phimoe"])
    tables = [load_model(checkpoints["phimoe"], config, dtype).rotary for dtype in (torch.float32, torch.bfloat16)]
    for name in ("inv_freq", "mscale"):
        exact, ours = (getattr(table, name) for table in tables)
        assert ours.dtype == torch.float32 and torch.equal(exact, ours)
    assert tables[0].mscale[:, 0].tolist() == pytest.approx([config.rope.short_mscale, config.rope.long_mscale])


def test_the_long_factors_are_applied_and_not_only_the_long_mscale(checkpoints: dict[str, Path]) -> None:
    model, token_ids = Model(checkpoints["phimoe"]), tokens(ORIGINAL + 1)
    gap = (model.logits(token_ids, rope_set=0) - model.logits(token_ids, rope_set=1)).abs().max()
    assert gap > 0.1
    scaling = {**PHIMOE["rope_scaling"], "long_mscale": 1.243}
    same_mscale = write(checkpoints["phimoe"].parent / "same-mscale", {**PHIMOE, "rope_scaling": scaling})
    model = Model(same_mscale)
    assert (model.logits(token_ids, rope_set=0) - model.logits(token_ids, rope_set=1)).abs().max() > 0.1


def test_biases_and_norm_biases_matter(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Each kind of bias, when zeroed on disk, changes the logits: none of them is dropped."""
    token_ids = tokens(20)
    for name, kinds in {
        "phimoe": ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "lm_head.bias",
                   "input_layernorm.bias", "post_attention_layernorm.bias", "model.norm.bias"),
        "phi-msft": ("Wqkv.bias", "out_proj.bias", "fc1.bias", "fc2.bias", ".ln.bias", "lm_head.linear.bias"),
    }.items():  # fmt: skip
        want = Model(checkpoints[name]).logits(token_ids)
        for kind in kinds:
            tensors = load_file(checkpoints[name] / "model.safetensors")
            hit = [key for key in tensors if key.endswith(kind)]
            assert hit, kind
            for key in hit:
                # A bias of k alone, the same for all keys, would cancel in the softmax but for the rotation.
                tensors[key] = torch.zeros_like(tensors[key])
            folder = tmp_path / f"{name}-{kind}"
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text((checkpoints[name] / "config.json").read_text())
            assert (Model(folder).logits(token_ids) - want).abs().max() > 1e-3, kind


def test_wqkv_is_all_q_then_all_k_then_all_v(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Read as [head][q, k, v], the same file gives another model, so the test of parity cannot pass by accident."""
    tensors = load_file(checkpoints["phi-msft"] / "model.safetensors")
    for name in tensors:
        if "Wqkv" in name:
            rest = tensors[name].shape[1:]
            tensors[name] = tensors[name].view(3, 4, 20, *rest).transpose(0, 1).reshape(240, *rest).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints["phi-msft"] / "config.json").read_text())
    token_ids = tokens(20)
    assert (Model(tmp_path).logits(token_ids) - Model(checkpoints["phi-msft"]).logits(token_ids)).abs().max() > 0.5


def test_a_tied_router_runs_the_first_experts_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All gate rows are equal, as in published phixtral: experts 0 and 1 run, half each; 2 and 3 do not matter."""
    folder = write(tmp_path / "tied", PHIXTRAL)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name] = tensors[name][:1].repeat(4, 1)
    save_file(tensors, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = Model(folder)
    assert "The router is tied (all gate rows equal) in 2 of 2 layers (first: 0): there experts 0..1 run" in caplog.text
    token_ids = tokens(40)
    want = model.logits(token_ids)
    torch.testing.assert_close(want, Reference(folder).logits(token_ids), atol=1e-4, rtol=0)
    for name in tensors:
        if ".mlp.2." in name or ".mlp.3." in name:
            tensors[name] = torch.randn_like(tensors[name])
    other = write(tmp_path / "other", PHIXTRAL)
    save_file(tensors, other / "model.safetensors")
    assert torch.equal(Model(other).logits(token_ids), want)


def test_an_untied_router_is_not_logged(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Model(checkpoints["phi-msft"])
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_half_precision_stays_near_fp32(checkpoints: dict[str, Path], architecture: str, dtype: torch.dtype) -> None:
    """Compare median errors with the reference's own: in both, routing may change for single tokens."""
    folder, token_ids = checkpoints[architecture], tokens(200)
    want = Reference(folder).logits(token_ids)
    error = (Model(folder, dtype).logits(token_ids) - want).abs().mean(-1).median()
    reference_error = (Reference(folder, dtype).logits(token_ids) - want).abs().mean(-1).median()
    assert error < 1.25 * reference_error, (error, reference_error)


def test_large_fp16_scores_do_not_overflow(tmp_path: Path) -> None:
    """phixtral's published weights give q.k beyond fp16's 65504 in the last layers; scores are computed in fp32."""
    folder = write(tmp_path, PHIXTRAL, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "Wqkv.weight" in name:
            tensors[name][:160] *= 150
    save_file(tensors, folder / "model.safetensors")
    assert Model(folder, torch.float16).logits(tokens(30)).isfinite().all()


def test_the_text_of_config_json_decides_top_k_and_experts(tmp_path: Path) -> None:
    config = {**MIXTRAL, "num_local_experts": 5, "num_experts_per_tok": 4}
    read = read_model_config(write(tmp_path, config))
    assert (read.num_experts, read.num_experts_per_tok) == (5, 4)
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 5
