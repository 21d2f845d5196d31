"""A checkpoint as users upload it, and the files of it that are needed, for tests of folders, stores and the hub."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import CheckpointError, UserError

NEEDED = {
    "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
}  # fmt: skip


def write_model(folder: Path) -> Path:
    """Write a checkpoint of two files, with tokenizer files, and with files that are not needed."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    for name in (
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
        "pytorch_model.bin",
        "other.onnx",
    ):
        (folder / name).write_text(f"this is {name}")
    where = {}
    for i in (1, 2):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({f"w{i}": torch.full((1000 * i,), float(i))}, folder / file)
        where[f"w{i}"] = file
    (folder / "consolidated.safetensors").write_bytes(b"not in the index")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def assert_same_files(copy: Path, folder: Path) -> None:
    assert {path.name for path in copy.iterdir() if not path.name.startswith(".")} == NEEDED
    for name in NEEDED:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name


def refusal(path: str, kind: type[UserError] = CheckpointError) -> str:
    with pytest.raises(UserError) as caught:
        ModelSource(path).files()
    assert type(caught.value) is kind
    return str(caught.value)
