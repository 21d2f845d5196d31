"""Measure the time and memory of loading a checkpoint into a model, compared with only reading the same files.

Makes a random bf16 Phi-MoE of 1.0 GB in four files in a temporary folder. Each way runs in a process of its own, in
turns, with the page cache warm. Packing the weights comes after loading and is counted separately.

    python benchmarks/bench_load.py [--rounds 20] [--dtype bfloat16] [--save]
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.weight_files import INDEX
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.config import ModelConfig, RopeConfig
from moray.engine.layers.post_load import process_weights_after_loading
from moray.engine.models.phimoe import PhimoeForCausalLM
from moray.engine.platform.cpus import available_cores
from moray.engine.runner.loader import build_model
from moray.kernels.cpu.huge_pages import advise_huge_pages

CONFIG = ModelConfig(
    architecture="phimoe", vocab_size=32064, hidden_size=1024, intermediate_size=1600, num_layers=6, num_heads=16,
    num_kv_heads=4, head_dim=64, num_experts=15, num_experts_per_tok=2, max_position_embeddings=4096, norm_eps=1e-5,
    rope=RopeConfig(10000.0, 64), dtype="bfloat16", attention_bias=True, lm_head_bias=True, router_jitter=0.01,
)  # fmt: skip
NUM_FILES = 4
BUFFER_BYTES = 8 << 20


def make_checkpoint(folder: Path) -> None:
    """Write the random model in NUM_FILES files with an index."""
    targets, generator = PhimoeForCausalLM.tensor_map(CONFIG), torch.Generator().manual_seed(0)
    names = list(targets)
    where = {
        name: f"model-{i * NUM_FILES // len(names) + 1:05}-of-{NUM_FILES:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in sorted(set(where.values())):
        tensors = {n: torch.randn(targets[n].shape, generator=generator).bfloat16() for n in names if where[n] == file}
        save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the files as the engine does, into the parameters of a model."""
    model = build_model(CONFIG, dtype)
    Checkpoint(folder).load_into(model, model.tensor_map(CONFIG))
    return model


def read(folder: Path, dtype: torch.dtype) -> list[memoryview]:
    """Read each file into memory of its own, in huge pages as `load` does: the least that must be done."""
    contents = []
    for path in weight_files(folder):
        with open(path, "rb", buffering=0) as stream:
            memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
            advise_huge_pages(memory)
            content, done = memory.numpy().data, 0
            while done < len(content):
                done += stream.readinto(content[done:])
            contents.append(content)
    return contents


def map_and_copy(folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Map the files with safetensors' load_file, and copy every tensor, as a model needs it."""
    return [tensor.clone() for path in weight_files(folder) for tensor in load_file(path).values()]


def map_and_touch(folder: Path, dtype: torch.dtype) -> int:
    """Map the files with load_file and sum up all bytes in the page cache; nothing is kept."""
    return sum(touch(tensor) for path in weight_files(folder) for tensor in load_file(path).values())


def stream_and_touch(folder: Path, dtype: torch.dtype) -> int:
    """Read all bytes through one small buffer and sum them up; nothing is kept."""
    total, buffer = 0, torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
    for path in weight_files(folder):
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer.numpy().data):
                total += touch(buffer)
    return total


def touch(tensor: torch.Tensor) -> int:
    """Return the sum of the tensor's bytes, as 64-bit numbers."""
    data = tensor.view(-1).view(torch.uint8)
    return int(data[: data.numel() // 8 * 8].view(torch.int64).sum())


WAYS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "load": load,
    "read": read,
    "map_and_copy": map_and_copy,
    "map_and_touch": map_and_touch,
    "stream_and_touch": stream_and_touch,
}


def pack(model: nn.Module) -> float:
    """Pack the weights on as many cores as the engine uses; return the seconds."""
    torch.set_num_threads(available_cores())
    start = time.perf_counter()
    process_weights_after_loading(model, CPU)
    return time.perf_counter() - start


def memory(key: str) -> int:
    """Return a line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(way: str, folder: Path, dtype: torch.dtype, answers: SimpleQueue[dict[str, float]]) -> None:
    """Measure one of WAYS in this process, and put the figures into the queue."""
    torch.set_num_threads(1)
    before, start, cpu = memory("RssAnon"), time.perf_counter(), time.process_time()
    kept = WAYS[way](folder, dtype)
    answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    # VmHWM includes the pages of the program's files and what was allocated before: both are subtracted.
    answer["peak"] = memory("VmHWM") - memory("RssFile") - before
    answer["after"] = memory("RssAnon") - before
    if isinstance(kept, nn.Module):
        answer["model"] = sum(param.nbytes for param in kept.parameters())
        answer["packing"] = pack(kept)
    answers.put(answer)


def run_all(rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Measure all ways in turns; return the figures."""
    fork = multiprocessing.get_context("fork")  # imports done, memory untouched
    answers: SimpleQueue[dict[str, float]] = fork.SimpleQueue()

    def run(target: Callable[..., None], *args: Any) -> None:
        process = fork.Process(target=target, args=args)
        process.start()
        process.join()
        assert process.exitcode == 0, f"{target.__name__}{args} ended with {process.exitcode}"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(make_checkpoint, folder)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                run(measure, way, folder, dtype, answers)
                found[way].append(answers.get())
        num_bytes = sum(path.stat().st_size for path in weight_files(folder))
    best = {way: min(answer["seconds"] for answer in found[way]) for way in WAYS}
    cpu = {way: min(answer["cpu_seconds"] for answer in found[way]) for way in WAYS}
    peak, model = max(answer["peak"] for answer in found["load"]), found["load"][0]["model"]
    return {
        "file_bytes": num_bytes,
        "seconds_best": rounded(best),
        "seconds_median": rounded({way: statistics.median(a["seconds"] for a in found[way]) for way in WAYS}),
        "cpu_seconds_best": rounded(cpu),
        "packing_seconds_median": round(statistics.median(answer["packing"] for answer in found["load"]), 3),
        "load_to_others_best": {way: round(best["load"] / best[way], 2) for way in WAYS if way != "load"},
        "load_to_others_cpu": {way: round(cpu["load"] / cpu[way], 2) for way in WAYS if way != "load"},
        "model_bytes": model,
        "anonymous_bytes_after_load": max(answer["after"] for answer in found["load"]),
        "peak_bytes_of_load": peak,
        "peak_to_model": round(peak / model, 3),
    }


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {way: round(value, 3) for way, value in seconds.items()}


def provenance() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{model[0].partition(': ')[2] if model else platform.processor()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; the files are bfloat16")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results")
    args = parser.parse_args()
    result = {**provenance(), **run_all(args.rounds, getattr(torch, args.dtype))}
    print(json.dumps(result, indent=2))
    if args.save:
        path = Path(__file__).parent / "results" / f"load-{args.dtype}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
