"""Tests of `moray quantize`: what it writes gives the bits of quantization on load, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FIRST_FAMILIES, LATER_FAMILIES
from torch import Tensor

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.weight_files import INDEX
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError, NodeError, OutputError
from moray.engine.params import SamplingParams
from moray.engine.quantization.on_load import quantize
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.quantization.written import written_tensors
from moray.engine.request import Request, TokenLogprobs
from moray.engine.runner.quantize_checkpoint import quantize_checkpoint
from moray.jobs.commands.quantize import quantize_model

KINDS = get_args(OnLoadKind)


def answer(folder: Path, **config: OnLoadKind) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
    engine = Engine(str(folder), EngineConfig(device="cpu", kv_cache_memory=1 << 20, dtype="bfloat16", **config))
    engine.add(Request("r", list(range(5, 35)), SamplingParams(max_tokens=5, ignore_eos=True, logprobs=20)))
    while True:
        for output in engine.step():
            if (done := output.completion) is not None:
                return done.token_ids, done.logprobs


@pytest.mark.parametrize(
    ("architecture", "kind"), [*product(FIRST_FAMILIES, KINDS), *product(LATER_FAMILIES, ["int4"])]
)
def test_a_written_checkpoint_gives_the_bits_of_quantization_on_load(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: OnLoadKind
) -> None:
    quantize_checkpoint(checkpoints[architecture], tmp_path / "out", kind)
    assert answer(tmp_path / "out") == answer(checkpoints[architecture], quantization=kind)


def test_the_tensors_are_those_of_compressed_tensors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Names, dtypes and values, unpacked here bit by bit; what is not quantized is the original's."""
    source = load_file(checkpoints["mixtral"] / "model.safetensors")
    module = "model.layers.1.block_sparse_moe.experts.3.w2"
    want = {kind: quantize(source[f"{module}.weight"], kind, 32 if kind == "int4" else None) for kind in KINDS}
    for kind in KINDS:
        quantize_checkpoint(checkpoints["mixtral"], tmp_path / kind, kind)
        tensors = load_file(tmp_path / kind / "model.safetensors")
        kept = {name for name in source if name in tensors and tensors[name].dtype == torch.float32}
        assert {
            name for name in kept if "gate" in name or "embed" in name or "lm_head" in name or "norm" in name
        } == kept
        assert all(torch.equal(source[name], tensors[name]) for name in kept) and len(kept) == 2 + 1 + 2 * 3
        scale = tensors[f"{module}.weight_scale"]
        assert torch.equal(scale.float(), want[kind].scales)
        if kind == "int4":
            words = tensors[f"{module}.weight_packed"]
            codes = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], dim=2).flatten(1)
            assert (words.dtype, scale.dtype, scale.shape) == (torch.int32, torch.bfloat16, (64, 2))
            assert torch.equal(codes, want[kind].codes.int())
            assert tensors[f"{module}.weight_shape"].tolist() == [64, 48]
        else:
            codes = tensors[f"{module}.weight"]
            assert (scale.dtype, scale.shape) == (torch.float32, (64, 1))
            assert codes.dtype == want[kind].codes.dtype
            assert torch.equal(codes.view(torch.uint8), want[kind].codes.view(torch.uint8))


def test_the_config_describes_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(checkpoints["phi-msft"], tmp_path / "out", "int4")
    values = json.loads((tmp_path / "out/config.json").read_text())
    announced = values.pop("quantization_config")
    assert values == json.loads((checkpoints["phi-msft"] / "config.json").read_text())
    assert (announced["quant_method"], announced["format"]) == ("compressed-tensors", "pack-quantized")
    assert announced["ignore"] == ["lm_head.linear", r"re:.*\.moe\.gate$"]
    weights = announced["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)


def test_a_large_model_is_written_in_several_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """All parts of a weight are in one file, and each tensor begins where its numbers may begin."""
    seen: list[tuple[int, int]] = []
    report = quantize_checkpoint(
        checkpoints["mixtral"], tmp_path / "out", "int4", lambda *done: seen.append(done), shard_bytes=60_000
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.num_files == len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == report.num_bytes
    for name, file in index["weight_map"].items():
        assert index["weight_map"].get(name.replace("_packed", "_scale")) == file
    for file in files:
        size = int.from_bytes((tmp_path / "out" / file).read_bytes()[:8], "little")
        header = json.loads((tmp_path / "out" / file).read_bytes()[8 : 8 + size])
        header.pop("__metadata__")
        width = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8}
        assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in header.values())
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            assert sum(tensors.get_tensor(name).nbytes for name in tensors.keys()) <= 60_000  # noqa: SIM118
    assert answer(tmp_path / "out") == answer(checkpoints["mixtral"], quantization="int4")
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_other_files_come_along_and_other_weights_do_not(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(checkpoints["mixtral"] / name)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin", ".gitattributes"):
        (source / name).write_text(name)
    (source / "original").mkdir()
    quantize_checkpoint(source, tmp_path / "out", "fp8")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "LICENSE", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (tmp_path / "out/LICENSE").read_text() == "LICENSE"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_is_refused_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there exists already"):
        quantize_checkpoint(checkpoints["mixtral"], tmp_path / "there", "int8")
    quantize_checkpoint(checkpoints["mixtral"], tmp_path / "once", "int8")
    with pytest.raises(CheckpointError, match=r"quantized already \(compressed-tensors int8\)"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", "int4")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").symlink_to(checkpoints["mixtral"] / "config.json")
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight has a value that is infinite"):
        quantize_checkpoint(damaged, tmp_path / "out", "int8")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Missing: model\.norm\.weight"):
        quantize_checkpoint(damaged, tmp_path / "out", "int8")
    (tmp_path / "a file").touch()
    with pytest.raises(NodeError, match="cannot be written"):
        quantize_checkpoint(checkpoints["mixtral"], tmp_path / "a file" / "out", "int8")
    assert sorted(os.listdir(tmp_path)) == ["a file", "damaged", "once", "there"]


KILLED = """
import os, signal, sys
from pathlib import Path
from moray.engine.runner.quantize_checkpoint import quantize_checkpoint

def stop(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), "int8", stop)
"""


def test_a_killed_run_leaves_nothing_that_looks_whole(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(checkpoints["mixtral"]), str(out)])
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial" and not (left / "config.json").exists()
    with pytest.raises(CheckpointError):
        answer(left)
    quantize_checkpoint(checkpoints["mixtral"], out, "int8")
    assert os.listdir(tmp_path) == ["out"] and answer(out) == answer(checkpoints["mixtral"], quantization="int8")


def test_two_runs_do_not_write_the_same_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    refused: list[OutputError] = []

    def other(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="being written by another process") as error:
                quantize_checkpoint(checkpoints["mixtral"], tmp_path / "out", "fp8")
            refused.append(error.value)

    quantize_checkpoint(checkpoints["mixtral"], tmp_path / "out", "int8", other)
    assert refused and answer(tmp_path / "out") == answer(checkpoints["mixtral"], quantization="int8")


def test_the_command(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize_model(str(checkpoints["mixtral"]), "out", "int4")
    assert capsys.readouterr().out.strip().endswith("of weights in 1 file, int4")
    assert with_quantization(read_model_config(tmp_path / "out"), None, "").quantization is not None


def test_padded_words() -> None:
    """13 inputs fill one word and 5 codes of the next."""
    weight = quantize(torch.arange(26, dtype=torch.float32).view(2, 13) - 13, "int4", 32)
    words: Tensor = written_tensors(weight)["weight_packed"]
    codes = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], dim=2).flatten(1)
    assert torch.equal(codes[:, :13], weight.codes.int()) and not codes[:, 13:].any()
