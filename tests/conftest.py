"""Fixtures that several folders share."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import MIXTRAL, PHIMOE, PHIXTRAL, write

# The shapes here are too small to share among threads, which only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random fp32 checkpoint of each architecture, by model_type."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {config["model_type"]: write(root / config["model_type"], config) for config in (PHIMOE, MIXTRAL, PHIXTRAL)}
