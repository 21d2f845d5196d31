"""Test that weights are never in memory as a whole before they are quantized."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import PHIMOE, write

from moray.batch.plan.model_info import read_config, read_model_info
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.quantization.scheme import OnLoadKind

# 100 MB of experts: 16 of 6.3 MB each.
WIDE = PHIMOE | {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "rope_scaling": None,
}
EXPERT_BYTES = 3 * 1024 * 1024 * 2
SLACK_BYTES = 16 << 20  # buffers of the files, and memory that the allocators keep

PEAK = """
import sys
from pathlib import Path
import torch
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.runner.loader import load_model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def load(folder):
    return load_model(Path(folder), with_quantization(read_model_config(Path(folder)), sys.argv[3], ""), torch.bfloat16)

torch.set_num_threads(1)
load(sys.argv[1])  # compiles what packs the weights
before = status("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # the highest value so far is that of now
model = load(sys.argv[2])
print(status("VmHWM") - status("RssFile") - before, status("RssAnon") - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("wide"), WIDE, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8"))])
def test_peak_memory_is_the_quantized_model_and_two_experts(
    checkpoints: dict[str, Path], wide: Path, kind: OnLoadKind
) -> None:
    folder = ModelSource(str(wide))
    size = read_model_info(folder, read_config(folder, kind), "bfloat16").weights_bytes
    command = [sys.executable, "-c", PEAK, str(checkpoints["phimoe"]), str(wide), kind]
    peak, after = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    bound = size + 2 * EXPERT_BYTES + SLACK_BYTES
    assert bound < 16 * EXPERT_BYTES, "the bound says nothing"
    assert size * 0.9 <= after <= peak <= bound
