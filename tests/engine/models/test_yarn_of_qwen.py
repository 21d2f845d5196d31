"""Tests of Qwen's families beyond their length, by YaRN at the numbers that their authors publish."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import Model, tokens
from tiny_checkpoints import QWEN2_MOE, QWEN3_MOE, Reference, write

from moray.engine.checkpoint.model_config import read_model_config

# Heads and base as published. The lengths are a 64th of the published ones, so that a short text passes them.
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
STRETCHED: dict[str, Any] = {"max_position_embeddings": 640, "rope_theta": 1e6, "rope_scaling": SCALING}


@pytest.mark.parametrize("tiny", [QWEN3_MOE, QWEN2_MOE], ids=["qwen3", "qwen2"])
def test_logits_beyond_the_length_of_the_model(tmp_path: Path, tiny: dict[str, Any]) -> None:
    folder, text = write(tmp_path / "stretched", tiny | STRETCHED), tokens(700)
    assert read_model_config(folder).max_position_embeddings == 2048
    got = Model(folder, num_blocks=48).logits(text)
    torch.testing.assert_close(got, Reference(folder).logits(text), atol=1e-4, rtol=0)
    plain = write(tmp_path / "plain", tiny | STRETCHED | {"rope_scaling": None, "max_position_embeddings": 2048})
    assert (Model(plain, num_blocks=48).logits(text) - got).abs().max() > 3e-3
