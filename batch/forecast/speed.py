"""Tokens a second of one worker, from where they were measured: an earlier run of the job, or a benchmark of the same
model on the same card. Never a guess: where nothing compares, the speed is not known."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch.ledger import Counts
from batch.output.folder import JOB, OutputFolder
from engine.checkpoint.model_config import read_model_config
from engine.config import ModelConfig
from engine.errors import CheckpointError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ALIKE = 2.0  # lengths that differ by more than this factor do not compare
SHAPE = (
    "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "num_experts", "num_experts_per_tok",
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """
    tokens_per_s:  of one worker: generated ones, the time for their prompts included; of a job that scores, those read
    source:        where it comes from, for a person
    """

    tokens_per_s: float
    source: str


@dataclass(frozen=True)
class Load:
    """What a job asks of a worker: tokens of a prompt and of an answer, on average; most sequences at once."""

    prompt: float
    output: float
    max_num_seqs: int


def speed_of_earlier_run(folder: OutputFolder) -> Speed | None:
    """From the job folder; None where no run got far enough to have a speed."""
    status = _read_json(folder.read(f"{JOB}/status.json"))
    run, tokens_per_s = status.get("run"), status.get("tokens_per_s")
    if not isinstance(run, str) or not isinstance(tokens_per_s, float | int) or tokens_per_s <= 0:
        return None
    events = (folder.read(f"{JOB}/events/{run}.jsonl") or b"").decode().splitlines()
    ready = [event for event in map(_read_json, events) if event.get("event") == "actor_ready"]
    workers = len({event.get("actor") for event in ready if event.get("stage") == "worker"})
    if workers == 0:
        return None
    number = f"{workers} worker{'' if workers == 1 else 's'}"
    return Speed(tokens_per_s / workers, f"run {run} of this job, {tokens_per_s:,.0f} tokens/s with {number}")


def generated_per_row(committed: Mapping[int, Counts]) -> float | None:
    """Tokens that the job's rows generated so far, on average; None where there are none yet."""
    ok = sum(counts.ok for counts in committed.values())
    return sum(counts.generated_tokens for counts in committed.values()) / ok if ok else None


def speed_of_benchmark(
    model: ModelConfig, dtype: str, card: str | None, load: Load, benchmarks: Path = BENCHMARKS
) -> Speed | None:
    """From benchmarks/results/<date>-<card>/: the latest mixed load of this model, in its own dtype on such a card, of
    about these lengths and no more sequences at once; of several, the one with the most."""
    if card is None or dtype != model.dtype:
        return None
    for folder in sorted((benchmarks / "results").glob("*/"), reverse=True):
        context = _read_json(_content(folder / "context.json"))
        name = context.get("card", {}).get("name", "")
        rows = [row for row in _rows(folder / "engine.json") if _compares(row, model, load, benchmarks)]
        if rows and re.search(rf"\b{re.escape(card)}\b", name):
            row = max(rows, key=lambda row: int(row["num_sequences"]))
            lengths = f"{row['num_sequences']} sequences, prompts of {row['prompt']}, answers of {row['output']} tokens"
            return Speed(float(row["tokens_per_s"]), f"benchmarks/results/{folder.name}/engine.json: {lengths}")
    return None


def _compares(row: Mapping[str, Any], model: ModelConfig, load: Load, benchmarks: Path) -> bool:
    if row.get("engine") != "moray" or row.get("kind") != "mixed" or "error" in row:
        return False
    try:
        measured = read_model_config(benchmarks / "configs" / row["model"])
    except CheckpointError:
        return False
    return (
        all(getattr(measured, name) == getattr(model, name) for name in SHAPE)
        and _is_alike(row["prompt"], load.prompt)
        and _is_alike(row["output"], load.output)
        and row["num_sequences"] <= load.max_num_seqs
    )


def _is_alike(one: float, other: float) -> bool:
    return min(one, other) > 0 and max(one, other) / min(one, other) <= ALIKE


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    content = _content(path)
    yield from json.loads(content) if content else ()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_json(content: bytes | str | None) -> dict[str, Any]:
    """Empty where there is none, or what was half written."""
    try:
        value = json.loads(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
