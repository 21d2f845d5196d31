"""Tests of stored tensors that hold something of every expert: each expert's tensors are read out of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moray.engine.checkpoint import weight_reader
from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.errors import CheckpointError

E, H, I = 3, 20, 7  # noqa: E741
EXPERTS = "model.layers.0.mlp.experts"


def make_stacks() -> dict[str, Tensor]:
    shapes = {
        "gate_up_proj": (E, H, 2 * I), "gate_up_proj_bias": (E, 2 * I),
        "down_proj": (E, I, H), "down_proj_bias": (E, H),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {f"{EXPERTS}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def of_expert(e: int) -> dict[str, Tensor]:
    up, bias, down, down_bias = (tensor[e] for tensor in make_stacks().values())
    return {
        "gate_proj.weight": up.T[0::2], "up_proj.weight": up.T[1::2], "down_proj.weight": down.T,
        "gate_proj.bias": bias[0::2], "up_proj.bias": bias[1::2], "down_proj.bias": down_bias,
    }  # fmt: skip


def open_split(folder: Path) -> Checkpoint:
    save_file(make_stacks(), folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.tensors = split_stacks(checkpoint.tensors, "gpt_oss")
    return checkpoint


@pytest.mark.parametrize("run_bytes", [weight_reader.RUN_BYTES, 4 * 2 * H * 3])
def test_rows_that_take_turns_and_rows_that_are_columns(
    tmp_path: Path, run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_reader, "RUN_BYTES", run_bytes)
    checkpoint = open_split(tmp_path)
    wanted = {f"{EXPERTS}.{e}.{name}": tensor for e in range(E) for name, tensor in of_expert(e).items()}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }
    for rows in (None, (slice(1, 3),), (slice(0, 2), slice(4, 7))):
        read = checkpoint.read(wanted, torch.device("cpu"), rows)
        for name, tensor in wanted.items():
            parts = tensor if rows is None else torch.cat([tensor[part] for part in rows])
            assert torch.equal(read[name], parts), (name, rows)


def test_numbers_become_the_targets_dtype(tmp_path: Path) -> None:
    checkpoint = open_split(tmp_path)
    name = f"{EXPERTS}.2.up_proj.weight"
    target = torch.empty(I, H, dtype=torch.bfloat16)
    weight_reader.read_tensors([(checkpoint.tensors[name], target)])
    assert torch.equal(target, of_expert(2)["up_proj.weight"].bfloat16())


def test_a_value_of_the_expert_beyond_float16_is_refused_and_one_of_a_neighbour_is_not(tmp_path: Path) -> None:
    stacks = make_stacks()
    stacks[f"{EXPERTS}.gate_up_proj"][1, 3, 4] = 1e6  # row 2 of expert 1's gate
    save_file(stacks, tmp_path / "model.safetensors")
    tensors = split_stacks(Checkpoint(tmp_path).tensors, "gpt_oss")
    target = torch.empty(I, H, dtype=torch.float16)
    weight_reader.read_tensors([(tensors[f"{EXPERTS}.1.up_proj.weight"], target)])
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_proj\.weight in .* beyond float16's"):
        weight_reader.read_tensors([(tensors[f"{EXPERTS}.1.gate_proj.weight"], target)])


def test_an_odd_row_too_many_shows_in_the_shape(tmp_path: Path) -> None:
    save_file({f"{EXPERTS}.gate_up_proj": torch.zeros(1, H, 2 * I + 1)}, tmp_path / "model.safetensors")
    tensors = split_stacks(Checkpoint(tmp_path).tensors, "gpt_oss")
    assert [tensor.shape for tensor in tensors.values()] == [(I + 1, H), (I, H)]


def test_what_is_no_stack_stays(tmp_path: Path) -> None:
    """A copy that moray quantized has each expert's tensors, and a bias alone is no matrix of experts."""
    names = (f"{EXPERTS}.0.gate_proj.weight", f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj_bias")
    save_file({name: torch.zeros(4) for name in names}, tmp_path / "model.safetensors")
    assert split_stacks(Checkpoint(tmp_path).tensors, "gpt_oss").keys() == set(names)
