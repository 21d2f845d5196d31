"""What the order of rows and shards is worth: a skewed workload in the files' order and in the job's.

    python benchmarks/bench_order.py [--rows 240] [--rounds 2]

Rows have one of 24 contexts (160..320 tokens, in turns, so that neighbours share nothing but the first 32 tokens) and a
question of their own; most generate 8..32 tokens, one in 20 generates 256, and the last eighth of the file has twice as
many of those. The KV cache holds the running rows and a few contexts more. Shards go through the worker's own
EngineThread, as many at once as a worker takes. The answers must be the same. Model: bench_model.py's.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import report
from bench_model import write_checkpoint
from pyarrow import fs
from rich.console import Console

from batch.input.footer import read_footer
from batch.planning.order import order_rows, order_shards
from batch.planning.plan import Shard, Slice
from batch.stages.engine_thread import EngineThread
from batch.stages.shard_run import Row, ShardRun
from engine.config import EngineConfig
from engine.cores import available_cores
from engine.metrics import Metrics
from engine.params import SamplingParams

SHARD_ROWS = 16
MAX_SEQS = 16
CALLS = 3
KV_CACHE_BYTES = 56 << 20  # 7,168 tokens
VOCAB_IN_USE = range(3, 32000)
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    config = EngineConfig(max_num_seqs=MAX_SEQS, kv_cache_memory=KV_CACHE_BYTES, num_threads=available_cores())
    checkpoint = str(write_checkpoint())
    thread = EngineThread(lambda: _load(checkpoint, config), _no_journal, _nobody_survives)
    rounds = []
    for n in range(args.rounds):
        rows = make_rows(args.rows, n)
        shards = cut(rows)
        of_files = run(thread, [(index, rows_of(rows, index)) for index in range(len(shards))])
        ordered = [(shard.index, order_rows(rows_of(rows, shard.index))) for shard in shards]
        of_job = run(thread, ordered)
        assert of_files.pop("tokens") == of_job.pop("tokens"), "the order changed an answer"
        rounds.append({"files": of_files, "job": of_job})
        console.print(f"files {of_files}\njob   {of_job}")
    best = {name: min(one[name]["seconds"] for one in rounds) for name in ("files", "job")}
    ratio = best["job"] / best["files"]
    console.print(f"The job's order takes {ratio:.2f} of the time that the files' order takes (best against best).")
    result = report.context("torch") | {"rows": args.rows, "ratio": round(ratio, 3), "rounds": rounds}
    console.print(f"Saved {report.save('bench_order', 'cpu', result).relative_to(report.ROOT)}")


def make_rows(number: int, round_id: int) -> list[Row]:
    """Lengths are the same in every round; tokens are not."""
    lengths, tokens = random.Random(0), random.Random(round_id)
    system = tokens.choices(VOCAB_IN_USE, k=32)
    contexts = [system + tokens.choices(VOCAB_IN_USE, k=lengths.randint(128, 288)) for _ in range(24)]
    rows = []
    for index in range(number):
        is_late = index >= number * 7 / 8
        is_long = lengths.random() < (0.1 if is_late else 0.05)
        params = SamplingParams(max_tokens=256 if is_long else lengths.randint(8, 32), ignore_eos=True)
        prompt = contexts[index % 24] + tokens.choices(VOCAB_IN_USE, k=lengths.randint(8, 24))
        rows.append(Row(index, prompt, params, index))
    return rows


def rows_of(rows: Sequence[Row], shard: int) -> list[Row]:
    return list(rows[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS])


def cut(rows: Sequence[Row]) -> list[Shard]:
    """The rows as a file with a row group a shard, and its shards in the job's order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.table({"ids": [row.prompt_token_ids for row in rows]}), path, row_group_size=SHARD_ROWS)
        file = read_footer(fs.LocalFileSystem(), str(path), path.name, path.stat().st_size)
    pieces = [(first, min(SHARD_ROWS, len(rows) - first)) for first in range(0, len(rows), SHARD_ROWS)]
    shards = [Shard(index, (Slice(file.path, *piece),)) for index, piece in enumerate(pieces)]
    return order_shards(shards, [file])


def run(thread: EngineThread, shards: Sequence[tuple[int, list[Row]]]) -> dict[str, Any]:
    """Seconds for all shards, what was found in the prefix cache, what was computed; and the tokens."""
    engine = thread.engine
    engine.scheduler.block_manager.reset()
    before = replace(engine.metrics)
    started = time.perf_counter()
    runs = [ShardRun(index, rows) for index, rows in shards]
    with ThreadPoolExecutor(CALLS) as calls:
        list(calls.map(thread.run, runs))
    seconds = time.perf_counter() - started
    spent = Metrics(**{name: value - getattr(before, name) for name, value in vars(engine.metrics).items()})
    done = {index: completions for one in runs for index, completions in one.completions.items()}
    return {
        "seconds": round(seconds, 2),
        "hit_rate": round(spent.cached_tokens / spent.prompt_tokens, 3),
        "computed_tokens": spent.computed_tokens,
        "preemptions": spent.preemptions,
        "steps": spent.steps,
        "tokens": [done[index][0].token_ids for index in sorted(done)],
    }


def _load(checkpoint: str, config: EngineConfig) -> Any:
    from engine.engine import Engine

    return Engine(checkpoint, config)


def _no_journal(rows: Any, *, is_alone: bool) -> None:
    """No process is expected to die."""


def _nobody_survives(shard: int, row: int) -> None:
    """There are no suspects."""


if __name__ == "__main__":
    main()
