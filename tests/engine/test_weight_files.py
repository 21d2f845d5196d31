"""Tests of finding a checkpoint's weight files, and of the errors for incomplete ones."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.errors import CheckpointError

FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def save(folder: Path) -> Path:
    save_file({"w": torch.arange(8.0)}, folder / "model.safetensors")
    return folder


def save_indexed(folder: Path) -> dict[str, str]:
    """Save one tensor in each of two files, and the index; return its weight_map."""
    where = {"a": FILES[0], "b": FILES[1]}
    for name, file in where.items():
        save_file({name: torch.arange(8.0)}, folder / file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Mapping[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_half_a_download(tmp_path: Path, kept: int) -> None:
    file = save(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (not a whole|cut short).*Fetch it again"):
        Checkpoint(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "is invalid"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "is invalid"),
        ({"dtype": "F32", "shape": [1]}, "is invalid"),
        ("no entry", "is invalid"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "cut short or damaged"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, entry: object, reason: str) -> None:
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["pytorch_model.bin"], r"found only pytorch_model\.bin.*never from pickles"),
        (["consolidated.00.pth", "params.json"], r"found only consolidated\.00\.pth\."),
        (["model-00001-of-00002.safetensors"], r"found only model-00001-of-00002\.safetensors\."),
        (["config.json"], "found no weights"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(tmp_path)


def test_two_candidates_are_refused(tmp_path: Path) -> None:
    save_indexed(save(tmp_path))
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_an_index_and_files_that_differ(tmp_path: Path) -> None:
    where = save_indexed(tmp_path)
    write_index(tmp_path, {"gone": where["a"], "b": where["b"]})
    with pytest.raises(CheckpointError, match=r"differ\.\nIn the index only: gone\.\nIn the file only: a\."):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"a": "model-00003-of-00003.safetensors"}, r"not there: model-00003-of-00003\.safetensors"),
        ({"a": "../model.safetensors"}, "only .safetensors files next to it"),
        ({"a": "pytorch_model.bin"}, "only .safetensors files next to it"),
        ({"a": 3}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_a_bad_index(tmp_path: Path, where: dict[str, object], reason: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    write_index(tmp_path, where)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "gone")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_half_a_download_is_found_by_its_size_alone(tmp_path: Path, kept: int) -> None:
    """Planning finds it too, wherever the folder is."""
    file = save(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (not a whole|cut short).*Fetch it again"):
        ModelSource(str(tmp_path)).tensors()


def test_headers_read_from_elsewhere_are_those_that_are_loaded(tmp_path: Path) -> None:
    where = save_indexed(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert ModelSource(f"{tmp_path}/").tensors() == Checkpoint(tmp_path).tensors
    write_index(tmp_path, {"gone": where["a"], "b": where["b"]})
    with pytest.raises(CheckpointError, match=r"differ\.\nIn the index only: gone\.\nIn the file only: a\."):
        ModelSource(str(tmp_path)).tensors()
