"""Tests that checkpoints are loaded into fused parameters, and that mistakes are named before data is read."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.weight_reader import RUN_BYTES, RUN_PIECES
from moray.engine.checkpoint.weights import Checkpoint, Target
from moray.engine.errors import CheckpointError
from moray.engine.runner.loader import build_model


class Fused(nn.Module):
    """A model with two projections stacked in one parameter, and experts in another."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 8) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.full((6, width), -9.0, dtype=dtype))
        self.experts = nn.Parameter(torch.full((2, 4, width), -9.0, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(-9.0, dtype=dtype))


def fused_map(width: int = 8) -> dict[str, Target]:
    targets = {
        "q.weight": Target("qk", (4, width), (slice(0, 4),)),
        "k.weight": Target("qk", (2, width), (slice(4, 6),)),
        "scale": Target("scale", ()),
    }
    for e in range(2):
        targets[f"experts.{e}.w1.weight"] = Target("experts", (2, width), (e, slice(0, 2)))
        targets[f"experts.{e}.w3.weight"] = Target("experts", (2, width), (e, slice(2, 4)))
    return targets


def stored(dtype: torch.dtype = torch.bfloat16, width: int = 8, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(target.shape, generator=generator) * scale).to(dtype)
        for name, target in fused_map(width).items()
    }


def save(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def save_indexed(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Save every other tensor into each of two files, and the index; return its weight_map."""
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def assert_loaded(model: nn.Module, targets: Mapping[str, Target], tensors: Mapping[str, Tensor]) -> None:
    params = dict(model.named_parameters())
    for name, target in targets.items():
        param = params[target.param]
        assert torch.equal(param[target.index], tensors[name].to(param.dtype)), name


def refusal(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Return the error message; assert that nothing was read."""
    model = Fused()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(save(folder, tensors)).load_into(model, fused_map())
    assert all(bool((param == -9).all()) for param in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_becomes_the_parameters(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    model = Fused(target)
    report = Checkpoint(save(tmp_path, stored(source))).load_into(model, fused_map())
    assert_loaded(model, fused_map(), stored(source))
    assert report.bytes == 113 * source.itemsize


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_tensors_longer_than_a_run(tmp_path: Path, target: torch.dtype) -> None:
    width = RUN_BYTES // 4 + 13  # rows of two bytes: no multiple of a run
    model, tensors = Fused(target, width), stored(torch.bfloat16, width)
    Checkpoint(save(tmp_path, tensors)).load_into(model, fused_map(width))
    assert_loaded(model, fused_map(width), tensors)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.bfloat16, torch.float32, torch.float64)])
def test_more_tensors_than_a_run_takes(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    count = 2 * RUN_PIECES + 1
    tensors = {f"w{i}": torch.full((i % 4 + 1,), float(i % 100), dtype=dtypes[i % len(dtypes)]) for i in range(count)}
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(torch.empty(tensor.shape, dtype=torch.bfloat16)))
    targets = {name: Target(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    Checkpoint(save(tmp_path, tensors)).load_into(model, targets)
    assert_loaded(model, targets, tensors)


def test_an_index_of_several_files(tmp_path: Path) -> None:
    save_indexed(tmp_path, stored())
    (tmp_path / "consolidated.00.pth").write_bytes(b"a pickle beside it is left alone")
    checkpoint, model = Checkpoint(tmp_path), Fused()
    checkpoint.load_into(model, fused_map())
    assert_loaded(model, fused_map(), stored())
    assert [file.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]


@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_each_architecture(checkpoints: dict[str, Path], architecture: str) -> None:
    folder = checkpoints[architecture]
    config = read_model_config(folder)
    model = build_model(config, torch.float32)
    targets = model.tensor_map(config)
    Checkpoint(folder).load_into(model, targets)
    assert_loaded(model, targets, load_file(folder / "model.safetensors"))


def test_progress_goes_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    Checkpoint(save(tmp_path, stored())).load_into(Fused(), fused_map(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (226, 226) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    tensors = stored() | {
        "k.weight": torch.zeros(3, 8, dtype=torch.bfloat16),
        "experts.1.w3.weight": torch.zeros(2, 8, dtype=torch.int8),
        "experts.1.w1.weight": torch.zeros(2, 8).to(torch.float8_e4m3fn),
        "q.bias": torch.zeros(4),
    }
    del tensors["q.weight"], tensors["scale"]
    message = refusal(tmp_path, tensors)
    assert "Missing: q.weight, scale." in message
    assert "Not of this model: q.bias." in message
    assert "Of another shape: k.weight [3, 8], must be [2, 8]." in message
    assert "Of a dtype other than F64, F32, F16, BF16: experts.1.w1.weight F8_E4M3, experts.1.w3.weight I8." in message


def test_many_alike_are_named_by_their_pattern(tmp_path: Path) -> None:
    extra = {f"layers.{layer}.experts.{e}.bias": torch.zeros(1) for layer in range(3) for e in range(4)}
    message = refusal(tmp_path, stored() | extra)
    assert "Not of this model: layers.*.experts.*.bias (12 tensors, the first layers.0.experts.0.bias)." in message


def test_tables_of_old_files_are_skipped(tmp_path: Path) -> None:
    tables = {"transformer.h.0.mixer.rotary_emb.inv_freq": torch.zeros(4), "h.0.attn.bias": torch.zeros(1, 4, 4)}
    model = Fused()
    report = Checkpoint(save(tmp_path, stored() | tables)).load_into(model, fused_map())
    assert_loaded(model, fused_map(), stored())
    assert report.bytes == 226


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    tensors = stored() | {"k.weight": torch.full((2, 8), 70000.0, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"k\.weight .* beyond float16's 65,504; use bfloat16"):
        Checkpoint(save(tmp_path, tensors)).load_into(Fused(torch.float16), fused_map())


def test_infinities_of_the_file_stay(tmp_path: Path) -> None:
    tensors = stored() | {"scale": torch.tensor(float("-inf"), dtype=torch.bfloat16)}
    model = Fused(torch.float16)
    Checkpoint(save(tmp_path, tensors)).load_into(model, fused_map())
    assert model.scale.item() == float("-inf")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, stored()))
    os.truncate(tmp_path / "model.safetensors", os.path.getsize(tmp_path / "model.safetensors") - 1)
    with pytest.raises(CheckpointError, match=r"ended while \S+ was read"):
        checkpoint.load_into(Fused(), fused_map())


def test_a_map_that_leaves_a_gap_is_our_mistake(tmp_path: Path) -> None:
    targets = fused_map()
    del targets["k.weight"]
    tensors = stored()
    del tensors["k.weight"]
    with pytest.raises(AssertionError, match="qk"):
        Checkpoint(save(tmp_path, tensors)).load_into(Fused(), targets)


PEAK = """
import sys, torch
from pathlib import Path
from moray.engine.checkpoint.weights import Checkpoint, Target

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
module = torch.nn.Module()
for i in range(8):
    module.register_parameter(f"w{i}", torch.nn.Parameter(torch.empty(8 << 20, dtype=torch.bfloat16)))
checkpoint, targets = Checkpoint(Path(sys.argv[1])), {f"w{i}": Target(f"w{i}", (8 << 20,)) for i in range(8)}
before = status("RssAnon")
checkpoint.load_into(module, targets)
print(status("VmHWM") - status("RssFile") - before, status("RssAnon") - before)
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory_is_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    size = 8 * 16 << 20
    save(tmp_path, {f"w{i}": torch.ones(8 << 20, dtype=dtype) for i in range(8)})
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    peak, after = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert size <= after <= size + (80 << 20)
    assert peak <= size + (96 << 20), "the model, and buffers of a few pieces"
