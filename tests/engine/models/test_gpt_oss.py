"""Tests of gpt-oss at its published numbers of YaRN, which tiny heads and short texts hide."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import Model, tokens
from tiny_checkpoints import GPT_OSS, Reference, write

# Heads, rope and window as published; the limit is one that activations of random weights reach.
PUBLISHED: dict[str, Any] = GPT_OSS | {
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 131072,
    "initial_context_length": 4096, "sliding_window": 128, "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def test_logits_at_the_published_numbers_of_yarn(tmp_path: Path) -> None:
    """Other bounds of the ramp, which a default would give, change the logits."""
    folder, text = write(tmp_path / "published", PUBLISHED), tokens(320)
    got = Model(folder, num_blocks=24).logits(text)
    torch.testing.assert_close(got, Reference(folder).logits(text), atol=1e-4, rtol=0)
    scaling = PUBLISHED["rope_scaling"] | {"truncate": True}
    truncated = write(tmp_path / "truncated", PUBLISHED | {"rope_scaling": scaling})
    assert (Model(truncated, num_blocks=24).logits(text) - got).abs().max() > 3e-3


@pytest.mark.parametrize("types", [None, ["full_attention", "sliding_attention"]])
def test_which_layers_have_the_window(tmp_path: Path, types: list[str] | None) -> None:
    """Without a list the first layer has it."""
    folder, text = write(tmp_path, GPT_OSS | {"layer_types": types}), tokens(90)
    torch.testing.assert_close(Model(folder).logits(text), Reference(folder).logits(text), atol=1e-4, rtol=0)
