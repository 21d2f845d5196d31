"""Find the speed of one worker where it was measured: in an earlier run of the job, or in a benchmark of the same model
on the same GPU. It is never guessed: without a comparable measurement it is not known."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.batch.ledger import Counts
from moray.batch.output.event_log import read_events
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.run_events import WORKER, ActorReady
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MAX_LENGTH_RATIO = 2.0  # lengths that differ by more than this factor are not comparable
SHAPE = (  # fields of ModelConfig that have to be equal
    "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "num_experts", "num_experts_per_tok", "dense_layers", "dense_intermediate_size", "shared_intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Holds a measured speed.

    tokens_per_s:  of one worker: generated tokens, with the time for their prompts; of a job that scores, tokens read
    source:        where it was measured, for a person
    """

    tokens_per_s: float
    source: str


@dataclass(frozen=True)
class MeasuredLoad:
    """Describes the load of a worker.

    prompt, output:  mean tokens of a prompt and of an answer
    max_num_seqs:    most sequences at once
    """

    prompt: float
    output: float
    max_num_seqs: int


def speed_of_earlier_run(folder: OutputFolder) -> Speed | None:
    """Return the speed of the job's last run, from the job folder; None where no run got far enough to have one."""
    status = _read_json(folder.read(f"{JOB}/status.json"))
    run, tokens_per_s = status.get("run"), status.get("tokens_per_s")
    if not isinstance(run, str) or not isinstance(tokens_per_s, float | int) or tokens_per_s <= 0:
        return None
    ready = [logged.event for logged in read_events(folder, run) if isinstance(logged.event, ActorReady)]
    workers = len({event.actor for event in ready if event.stage == WORKER})
    if workers == 0:
        return None
    number = f"{workers} worker{'' if workers == 1 else 's'}"
    return Speed(tokens_per_s / workers, f"run {run} of this job, {tokens_per_s:,.0f} tokens/s with {number}")


def generated_per_row(committed: Mapping[int, Counts]) -> float | None:
    """Return how many tokens the job's rows have generated on average; None where none has finished."""
    ok = sum(counts.ok for counts in committed.values())
    return sum(counts.generated_tokens for counts in committed.values()) / ok if ok else None


def speed_of_benchmark(
    model: ModelConfig, dtype: str, gpu: str | None, load: MeasuredLoad, benchmarks: Path = BENCHMARKS
) -> Speed | None:
    """Return the speed of a benchmark in benchmarks/results/<date>-<GPU>/; None where none is comparable.

    It is the latest mixed load of this model, in its own dtype and with weights of the same format on this GPU, with
    about these lengths and no more sequences at once; of several, the one with the most sequences.
    """
    if gpu is None or dtype != model.dtype:
        return None
    for folder in sorted((benchmarks / "results").glob("*/"), reverse=True):
        context = _read_json(_content(folder / "context.json"))
        name = context.get("card", {}).get("name", "")
        rows = [row for row in _rows(folder / "engine.json") if _is_comparable(row, model, load, benchmarks)]
        if rows and re.search(rf"\b{re.escape(gpu)}\b", name):
            row = max(rows, key=lambda row: int(row["num_sequences"]))
            lengths = f"{row['num_sequences']} sequences, prompts of {row['prompt']}, answers of {row['output']} tokens"
            return Speed(float(row["tokens_per_s"]), f"benchmarks/results/{folder.name}/engine.json: {lengths}")
    return None


def _is_comparable(row: Mapping[str, Any], model: ModelConfig, load: MeasuredLoad, benchmarks: Path) -> bool:
    if row.get("engine") != "moray" or row.get("kind") != "mixed" or "error" in row:
        return False
    try:
        measured = read_model_config(benchmarks / "configs" / row["model"])
    except CheckpointError:
        return False
    return (
        all(getattr(measured, name) == getattr(model, name) for name in SHAPE)
        and _is_similar(row["prompt"], load.prompt)
        and _is_similar(row["output"], load.output)
        and row["num_sequences"] <= load.max_num_seqs
        and row.get("quantization") == (None if model.quantization is None else model.quantization.label)
    )


def _is_similar(one: float, other: float) -> bool:
    return min(one, other) > 0 and max(one, other) / min(one, other) <= MAX_LENGTH_RATIO


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    content = _content(path)
    yield from json.loads(content) if content else ()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_json(content: bytes | str | None) -> dict[str, Any]:
    """Parse a JSON object; an empty one where there is none, or only a part was written."""
    try:
        value = json.loads(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
