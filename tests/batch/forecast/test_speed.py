"""Speeds from earlier runs and benchmarks, and measurements that are not comparable."""

import json
from pathlib import Path
from typing import Any

import pytest
from repository import CONFIGS

from moray.batch.forecast.speed import MeasuredLoad, generated_per_row, speed_of_benchmark, speed_of_earlier_run
from moray.batch.ledger import Counts
from moray.batch.output.folder import JOB, OutputFolder
from moray.engine.checkpoint.model_config import read_model_config

PHI = read_model_config(CONFIGS / "phi-3.5-moe")
LOAD = MeasuredLoad(prompt=500.0, output=200.0, max_num_seqs=256)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """Write results of a GPU as benchmarks/bench_gpu.py does."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    rows: list[dict[str, Any]] = [
        {"engine": "ceilings", "copy": 1.0},
        {
            "engine": "moray",
            "model": "phi-3.5-moe",
            "kind": "decode",
            "num_sequences": 256,
            "prompt": 512,
            "output": 32,
        },
        *(
            {"engine": "moray", "model": "phi-3.5-moe", "kind": "mixed", "prompt": 512, "output": 256}
            | {"num_sequences": count, "tokens_per_s": 10.0 * count}
            for count in (128, 256, 512)
        ),
    ]
    folder = tmp_path / "results/2026-11-30-h200"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(json.dumps(rows))
    (folder / "context.json").write_text(json.dumps({"card": {"name": "NVIDIA H200"}}))
    (tmp_path / "results/2026-12-01-empty").mkdir()
    return tmp_path


def test_the_fullest_load_that_compares(benchmarks: Path) -> None:
    found = speed_of_benchmark(PHI, "bfloat16", "H200", LOAD, benchmarks)
    assert found is not None and found.tokens_per_s == 2560.0
    assert found.source.startswith("benchmarks/results/2026-11-30-h200/engine.json: 256 sequences")


@pytest.mark.parametrize(
    ("card", "dtype", "load", "model"),
    [
        ("H20", "bfloat16", LOAD, "phi-3.5-moe"),
        (None, "bfloat16", LOAD, "phi-3.5-moe"),
        ("H200", "float32", LOAD, "phi-3.5-moe"),
        ("H200", "bfloat16", LOAD, "mixtral-8x7b"),
        ("H200", "bfloat16", MeasuredLoad(20.0, 200.0, 256), "phi-3.5-moe"),
        ("H200", "bfloat16", MeasuredLoad(500.0, 2000.0, 256), "phi-3.5-moe"),
        ("H200", "bfloat16", MeasuredLoad(500.0, 200.0, 64), "phi-3.5-moe"),
    ],
)
def test_what_differs_does_not_compare(benchmarks: Path, card: str, dtype: str, load: MeasuredLoad, model: str) -> None:
    assert speed_of_benchmark(read_model_config(CONFIGS / model), dtype, card, load, benchmarks) is None


def test_no_results_are_no_speed(tmp_path: Path) -> None:
    assert speed_of_benchmark(PHI, "bfloat16", "H200", LOAD, tmp_path) is None


def test_a_run_of_the_same_job_is_shared_out_among_its_workers(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    assert speed_of_earlier_run(folder) is None
    folder.write(f"{JOB}/status.json", json.dumps({"run": "r1", "tokens_per_s": 900.0}).encode())
    assert speed_of_earlier_run(folder) is None, "it is not known how many workers it had"
    ready = [
        {"at": "2026-11-29T15:40:45+00:00", "event": "actor_ready", "stage": stage, "actor": actor}
        | {"pid": 1, "node": "n"}
        for stage, actor in (("worker", "a"), ("worker", "b"), ("worker", "a"), ("prepare", "c"))
    ]
    folder.write(f"{JOB}/events/r1.jsonl", "".join(f"{json.dumps(event)}\n" for event in ready).encode() + b'{"half')
    found = speed_of_earlier_run(folder)
    assert found is not None
    assert (found.tokens_per_s, found.source) == (450.0, "run r1 of this job, 900 tokens/s with 2 workers")
    folder.write(f"{JOB}/status.json", json.dumps({"run": "r1", "tokens_per_s": 0.0}).encode())
    assert speed_of_earlier_run(folder) is None


def test_tokens_of_a_row_so_far() -> None:
    assert generated_per_row({}) is None
    assert generated_per_row({0: Counts(ok=0, failed=3)}) is None
    assert generated_per_row({0: Counts(ok=3, failed=1, generated_tokens=60), 4: Counts(ok=1)}) == 15.0
