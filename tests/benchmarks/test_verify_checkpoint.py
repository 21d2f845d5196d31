"""Tests of the script that compares a checkpoint's logits with transformers'."""

import json
from pathlib import Path

import pytest
import torch
import verify_checkpoint
from repository import EXAMPLES
from safetensors.torch import load_file, save_file

from moray.engine.layers.attention import attention_layers
from moray.engine.models.granitemoe import GraniteMoeForCausalLM


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_logits(checkpoints: dict[str, Path], dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_checkpoint.main([str(checkpoints["granitemoe"]), "--dtype", dtype]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"granitemoe in {dtype}, 10 prompts" and len(lines) == 13
    assert lines[-1].startswith("EQUAL: ") and f" of {sum(verify_checkpoint.RANDOM_LENGTHS)} positions" in lines[-1]


def test_texts_go_through_the_tokenizer_of_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_checkpoint.main([str(EXAMPLES / "tiny-phimoe")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "phimoe in float32, 10 prompts" and lines[-1].startswith("EQUAL: ")


def test_a_mistake_of_which_no_token_tells(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale_wrongly(model: GraniteMoeForCausalLM) -> None:
        for layer in attention_layers(model):
            layer.scale *= 1.1

    monkeypatch.setattr(GraniteMoeForCausalLM, "validate_weights", scale_wrongly)
    assert verify_checkpoint.main([str(checkpoints["granitemoe"])]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT EQUAL: ")


def test_logits_that_are_no_numbers_are_not_equal(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(checkpoints["granitemoe"] / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints["granitemoe"] / "config.json").read_text())
    assert verify_checkpoint.main([str(tmp_path)]) == 1


def test_what_cannot_be_compared(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_checkpoint.main([str(checkpoints["phi-msft"])]) == 2
    assert "no class for phi-msft" in capsys.readouterr().err
    assert verify_checkpoint.main([str(tmp_path / "nothing")]) == 2
    (tmp_path / "model.safetensors").symlink_to(checkpoints["mixtral"] / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert verify_checkpoint.main([str(tmp_path)]) == 2
    assert "model_type is 'llama'" in capsys.readouterr().err
