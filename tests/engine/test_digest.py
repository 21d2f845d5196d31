"""Tests that the digest of a checkpoint changes with everything that changes its answers, and with nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moray.engine.checkpoint.digest import SAMPLE_BYTES, weights_digest
from moray.engine.checkpoint.model_source import ModelSource


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    (folder / "tokenizer.json").write_text('{"vocab": {}}')
    (folder / "README.md").write_text("about")
    # 80 samples long: the 64 samples leave gaps
    save_file({"w": torch.arange(80 * SAMPLE_BYTES // 4, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


def digest(folder: Path) -> str:
    return weights_digest(ModelSource(str(folder)))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_it_is_the_same_for_a_copy_elsewhere(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert digest(model) == digest(tmp_path / "copy")


def test_it_is_the_same_on_s3(model: Path, s3: Any, bucket: str) -> None:
    for path in model.iterdir():
        s3.upload_file(str(path), bucket, f"m/{path.name}")
    assert weights_digest(ModelSource(f"s3://{bucket}/m")) == digest(model)


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("config.json", 20),
        ("tokenizer.json", -1),
        ("model.safetensors", 40),  # in the header
        ("model.safetensors", 2000),  # in the first sample
        ("model.safetensors", 13 * SAMPLE_BYTES),  # in the eleventh
        ("model.safetensors", -1),
    ],
)
def test_a_changed_byte_changes_it(model: Path, name: str, offset: int) -> None:
    before = digest(model)
    flip(model / name, offset)
    assert digest(model) != before


def test_a_changed_size_changes_it(model: Path) -> None:
    before = digest(model)
    with open(model / "model.safetensors", "ab") as stream:
        stream.write(b"\0")
    assert digest(model) != before


def test_a_renamed_or_new_file_changes_it(model: Path) -> None:
    before = digest(model)
    (model / "tokenizer.json").rename(model / "tokenizer2.json")
    renamed = digest(model)
    (model / "generation_config.json").write_text("{}")
    assert len({before, renamed, digest(model)}) == 3


def test_other_files_do_not(model: Path) -> None:
    before = digest(model)
    (model / "README.md").write_text("more about it")
    (model / "pytorch_model.bin").write_bytes(b"not read")
    assert digest(model) == before


def test_it_does_not_read_it_all(model: Path) -> None:
    """A changed byte between two samples is not noticed: the price of a cheap digest."""
    save_file({"w": torch.zeros(256 * SAMPLE_BYTES // 4)}, model / "model.safetensors")
    before = digest(model)
    flip(model / "model.safetensors", 2 * SAMPLE_BYTES)
    assert digest(model) == before
