"""Measure the overhead of the batch pipeline over the engine alone: `moray run` and Engine get the same requests.

    python benchmarks/bench_batch.py [--rows 256] [--rounds 2] [--threads 2]

The model is bench_engine.py's, the rows are its requests as token ids, with max_tokens in a column. Both run in turns.
The pipeline's time counts from the moment its worker has the model loaded to the last commit; what comes before (Ray,
the other actors, loading) is shown separately, because it does not grow with the rows.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import report
import yaml
from bench_engine import HERE, OURS
from bench_model import add_tokenizer, write_checkpoint
from contender import Contender, Work, make_work
from rich.console import Console
from run_moray import KV_CACHE_BYTES

console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """Holds the figures of one `moray run`.

    startup_s:  seconds until the worker is ready
    work_s:     seconds from then to the last commit
    wall_s:     seconds of the whole command
    tokens:     row -> its generated token ids
    """

    startup_s: float
    work_s: float
    wall_s: float
    tokens: dict[int, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the engine alone; a worker takes all cores")
    args = parser.parse_args()
    checkpoint = write_checkpoint()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moray-bench-batch-") as name, console.status("") as status:
        for n in range(args.rounds):
            work = make_work(args.rows, n)
            status.update(f"round {n + 1} of {args.rounds}: the engine alone")
            seconds, tokens, others = run_alone(checkpoint, work, args.threads, Path(name))
            status.update(f"round {n + 1} of {args.rounds}: the job")
            job = run_job(add_tokenizer(checkpoint), work, Path(name) / f"round-{n}")
            same = sum(job.tokens[row] == own for row, own in enumerate(tokens)) / len(tokens)
            rounds.append(
                {
                    "engine_s": round(seconds, 2),
                    "job_work_s": round(job.work_s, 2),
                    "job_startup_s": round(job.startup_s, 2),
                    "job_wall_s": round(job.wall_s, 2),
                    "output_tokens": sum(map(len, tokens)),
                    "rows_with_the_same_tokens": round(same, 3),
                    "cpu_share_of_others": round(others, 3),
                }
            )
            console.print(
                f"engine alone {seconds:.1f} s, job {job.work_s:.1f} s ({job.work_s / seconds - 1:+.1%}) after "
                f"{job.startup_s:.1f} s to start; {same:.0%} of rows have the same tokens"
            )
    cost = median(r["job_work_s"] / r["engine_s"] for r in rounds) - 1
    console.print(f"The pipeline costs {cost:.1%} over the engine alone (median of {args.rounds} pairs).")
    result = report.context("torch", "ray", "pyarrow") | {"rows": args.rows, "cost": round(cost, 4), "rounds": rounds}
    console.print(f"Saved {report.save('bench_batch', 'cpu', result).relative_to(report.ROOT)}")


def run_alone(checkpoint: Path, work: list[Work], threads: int, logs: Path) -> tuple[float, list[list[int]], float]:
    """Run the requests on the engine alone, in a process that ends before the job starts.

    Returns its seconds, its tokens, and the share of the CPU time that other processes used meanwhile.
    """
    command = [sys.executable, str(HERE / "run_moray.py"), str(checkpoint), str(threads)]
    engine = Contender(OURS, command, threads, logs / "engine.log")
    try:
        engine.wait_ready()
        result = engine.run(work)
    finally:
        engine.close()
    return result.seconds, result.tokens, result.others


def run_job(model: Path, work: list[Work], folder: Path) -> Job:
    """Run the requests as a job in `folder`. Raises CalledProcessError with the job's own output on the terminal."""
    folder.mkdir(parents=True)
    columns = {
        "row": pa.array(range(len(work)), pa.int32()),
        "ids": pa.array([w.prompt for w in work], pa.list_(pa.int32())),
        "length": pa.array([w.max_tokens for w in work], pa.int32()),
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    spec = {
        "name": "bench",
        "model": {"path": str(model)},
        "input": {"path": str(folder / "rows.parquet"), "token_ids": "ids"},
        "sampling": {"ignore_eos": True, "columns": {"max_tokens": "length"}},
        "output": {"path": str(folder / "out"), "keep": ["row"], "token_ids": True},
        "engine": {"kv_cache_memory": KV_CACHE_BYTES},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    started = time.time()
    with (folder / "job.log").open("w") as log:
        command = [sys.executable, "-m", "moray.jobs.cli", "run", str(folder / "job.yaml")]
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    wall_s = time.time() - started
    if code != 0:
        raise SystemExit(f"moray run ended with {code}:\n{(folder / 'job.log').read_text()[-2000:]}")
    (events,) = (folder / "out" / "_job" / "events").glob("*.jsonl")
    times = [(e, datetime.datetime.fromisoformat(e["at"]).timestamp()) for e in map(json.loads, events.open())]
    ready = max(at for e, at in times if e["event"] == "actor_ready" and e["stage"] == "worker")
    committed = max(at for e, at in times if e["event"] == "committed")
    rows = pq.read_table(list((folder / "out").glob("part-*.parquet")), columns=["row", "generated_token_ids"])
    tokens: dict[Any, Any] = dict(zip(rows["row"].to_pylist(), rows["generated_token_ids"].to_pylist(), strict=True))
    return Job(ready - started, committed - ready, wall_s, tokens)


if __name__ == "__main__":
    main()
