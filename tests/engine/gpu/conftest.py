"""Set up Triton before any kernel is imported."""

from pathlib import Path

import pytest
import triton_device  # noqa: F401
from tiny_checkpoints import GPT_OSS, MIXTRAL, PHIMOE, PHIXTRAL, QWEN2_MOE, write


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of some families, by model_type, so small that the interpreter runs steps in seconds."""
    root = tmp_path_factory.mktemp("one_layer")
    small = {"num_hidden_layers": 1, "num_local_experts": 4}
    shared = QWEN2_MOE | {"num_hidden_layers": 1, "num_experts": 4, "mlp_only_layers": []}
    sinks = GPT_OSS | small | {"layer_types": ["sliding_attention"], "sliding_window": 8}
    configs = PHIMOE | small, MIXTRAL | small, PHIXTRAL | {"n_layer": 1}, shared, sinks
    return {config["model_type"]: write(root / config["model_type"], config) for config in configs}
