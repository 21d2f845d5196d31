"""A job folder with everything a report can show, written as a job writes it, without running one."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from moray.batch.fingerprint import Fingerprint
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import PLAN
from moray.batch.output.part import encode_part
from moray.batch.output.part_stats import count_latencies, count_part
from moray.batch.output_columns import ERROR
from moray.batch.shards import Plan, Shard, Slice

BEGIN = datetime(2026, 11, 20, 18, 0, tzinfo=UTC)
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "</style><style>body { display: none }</style>",
    '"><img src="http://evil.example/x.png" onerror="document.title = \'owned\'">',
    "\u202egnp.exe\u202c \u2066hidden\u2069 \x07\x00",
    "{{ 7 * 7 }} {% include '/etc/passwd' %} ${7*7}",
    "x" * 10_000,
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار",
)
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()), ("sample", pa.int32()), ("generated_text", pa.string()),
        ("finish_reason", pa.string()), ("num_prompt_tokens", pa.int32()), ("num_generated_tokens", pa.int32()),
        ("error", ERROR), ("source_file", pa.string()), ("source_row", pa.int64()),
    ]
)  # fmt: skip
SPEC = """\
name: {name}
task: generate
model: {{path: 'hf://microsoft/Phi-3.5-MoE-instruct', dtype: auto}}
input: {{path: data/prompts, prompt: prompt}}
workers: {{gpus: 1}}
output: {{path: {path}}}
"""


def made_plan(num_shards: int, shard_rows: int) -> Plan:
    shards = (Shard(i, (Slice("part-1.parquet", i * shard_rows, shard_rows),)) for i in range(num_shards))
    return Plan(Fingerprint({"part-1.parquet": "x"}, {"task": "generate"}), tuple(shards))


def made_part(plan: Plan, shard: Shard, errors: Sequence[tuple[int, str, str]] = (), *, seed: int = 0) -> bytes:
    """errors: row of the shard, code, message; their prompts are hostile"""
    chance, failed = random.Random(f"{seed} {shard.index}"), {row: error for row, *error in errors}
    rows: list[dict[str, Any]] = []
    for index in range(shard.num_rows):
        source = {"sample": 0, "source_file": "part-1.parquet", "source_row": shard.slices[0].first_row + index}
        if index in failed:
            code, message = failed[index]
            error = {"stage": "generate", "code": code, "message": message}
            rows.append(source | {"prompt": HOSTILE[index % len(HOSTILE)], "finish_reason": "error", "error": error})
            continue
        lengths = {
            "num_prompt_tokens": round(chance.lognormvariate(5, 0.8)) + 1,
            "num_generated_tokens": min(256, round(chance.lognormvariate(4.4, 0.7))),
        }
        reason = "length" if lengths["num_generated_tokens"] == 256 else "stop"
        rows.append(source | lengths | {"prompt": "a question", "generated_text": "an answer", "finish_reason": reason})
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    latencies = (chance.lognormvariate(0.8, 0.5) for _ in range(shard.num_rows - len(failed)))
    record = *count_part(table, 1.0, count_latencies(latencies)), {"moray": "0.1.0"}
    return encode_part(table, plan.fingerprint.hexdigest, shard.index, *record)


class Events:
    """The events of a run, at seconds from BEGIN."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"_job/events/{name}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, second: float, event: str, **fields: Any) -> None:
        line = {"at": (BEGIN + timedelta(seconds=second)).isoformat(timespec="milliseconds"), "event": event, **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def worker(self, actor: str, start: float, ready: float, host: str = "gpu-node-1") -> None:
        where = {"stage": "worker", "actor": actor, "node": "f" * 56}
        self.add(start, "actor_started", **where)
        about = {"host": host, "device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "products": ""}
        self.add(ready, "actor_ready", **where, pid=4000 + len(actor), **about)


def write_job(folder: Path, name: str = "summaries", num_layers: int = 32, num_experts: int = 16) -> Plan:
    """Three runs: one that was killed, after a worker had died in it, one that was cancelled, one that finished."""
    plan = made_plan(num_shards=40, shard_rows=25)
    out = OutputFolder(str(folder))
    out.write(PLAN, plan.to_json().encode())
    out.write("_job/spec.yaml", SPEC.format(name=json.dumps(name), path=folder).encode())
    errors = [[(n, "too_long", text) for n, text in enumerate(HOSTILE)], [(3, "killed_worker", "2 workers died")]]
    for shard in plan.shards:
        of_shard = errors[shard.index] if shard.index < len(errors) else []
        out.write(plan.part_name(shard), made_part(plan, shard, of_shard))
    last = 0
    for number, (begin, first, count, ending) in enumerate(
        ((0, 0, 14, None), (3600 * 5, 14, 16, "CANCELLED"), (3600 * 40, 30, 10, "SUCCEEDED"))
    ):
        last = _run(folder, f"run{number}", begin, range(first, first + count), ending, num_layers, num_experts)
    ok, failed = 1000 - len(HOSTILE) - 1, len(HOSTILE) + 1
    counts = {"input_rows": 1000, "ok_rows": ok, "failed_rows": failed, "pending_rows": 0}
    updated = (BEGIN + timedelta(seconds=last)).isoformat()
    status = {"name": name, "state": "SUCCEEDED", "reason": None, "updated_at": updated, **counts}
    out.write("_job/status.json", json.dumps(status).encode())
    forecast = {
        "rows": 1000, "prompt_tokens": {"expected": 200_000, "low": 190_000, "high": 210_000},
        "generated_tokens": {"expected": None, "low": 0, "high": 256_000}, "error_rows": {"too_long": 5},
        "tokens_per_s": 61.5, "source": "an earlier run of this job", "seconds": 1800.0,
        "card_hours": 1.5, "price": 3.0,
    }  # fmt: skip
    out.write("_job/forecast.json", json.dumps(forecast).encode())
    return plan


def _run(
    folder: Path, name: str, begin: int, shards: range, ending: str | None, num_layers: int, num_experts: int
) -> int:
    """Returns the second of its end."""
    events, chance = Events(folder, name), random.Random(name)
    rows = 25 * shards.start
    events.add(begin, "started", rows=1000, pending=1000 - rows, is_retry=False, versions={"ray": "2.60.0"})
    workers = [f"{name}worker{n}" for n in range(3)]
    for number, worker in enumerate(workers):
        events.worker(worker, begin + 10 + number, begin + 70 + 20 * number, f"gpu-node-{number + 1}")
    tokens = Counter(prompt=5000 * shards.start, generated=2000 * shards.start)
    seconds = 40 * len(shards)
    for step in range(0, seconds, 10):
        at = begin + 80 + step
        share = step / seconds
        if step % 40 == 0:
            shard = shards[step // 40]
            events.add(at, "committed", shard=shard, ok=25, failed=0)
        tokens.update(prompt=round(1250 * chance.uniform(0.7, 1.2)), generated=round(500 * chance.uniform(0.6, 1.3)))
        told = [
            {
                "actor": worker, "node": "f" * 56, "seqs": round(64 * chance.uniform(0.8, 1)),
                "waiting_seqs": round(100 * (1 - share)), "busy": chance.uniform(0.85, 1),
                "kv_use": 0.4 + 0.3 * share, "cached_tokens": 500 * step, "computed_tokens": 2000 * step,
                "preemptions": step // 100,
            }
            for worker in workers
        ]  # fmt: skip
        figures = {"rows_done": rows + round(25 * step / 40), "failed_rows": 0, "prompt_tokens": tokens["prompt"]}
        events.add(at, "figures", **figures, generated_tokens=tokens["generated"], workers=told)
        if name == "run0" and step == 200:
            where = {"stage": "worker", "actor": workers[1]}
            events.add(at + 5, "actor_lost", **where, pid=4011, rows=61, shard=4, row=7)
            events.worker(workers[1], at + 5, at + 60, "gpu-node-2")
    loads = [[chance.lognormvariate(9, 0.25 + 0.02 * layer) for _ in range(num_experts)] for layer in range(num_layers)]
    if num_layers:
        loads[num_layers // 2][min(5, num_experts - 1)] *= 4
        loads[-1][0] = 0
    end = begin + 80 + seconds
    if ending is not None:
        events.add(end, "experts", actor=workers[0], tokens=[[round(load) for load in row] for row in loads])
        reason = "SIGINT" if ending == "CANCELLED" else None
        events.add(end, "ended", state=ending, reason=reason, pending=1000 - 25 * shards.stop)
    return end
