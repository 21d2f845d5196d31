"""Measure the effect of the order of rows, and of more shards in a worker: each load runs in two orders, in turns.

    python benchmarks/bench_order.py [--load lengths | prefixes | neither] [--pairs 3]

lengths:   rows of few tokens, which generate 4..16; one in 16 generates 160. Lengths are not known beforehand.
prefixes:  rows begin with one of 24 contexts of 160 tokens, in turns; the KV cache holds the running rows and few more.
neither:   as prefixes, but rows with the same context are neighbours, so that the order changes nothing.

"files" is the order of the files, with two shards in the worker; "job" is what a worker of a job does: rows with the
longest cached prefix first, and as many shards as `choose_resources` gives it. Shards of 16 rows go through the
worker's own ShardExecutor, at most 16 sequences at once. The answers must be the same. The model is bench_model.py's.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import Any

import report
from bench_model import write_checkpoint
from rich.console import Console

from moray.batch.plan.resources import shards_per_worker
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.batch.worker.shard_executor import ShardExecutor
from moray.engine.config import EngineConfig
from moray.engine.metrics import Metrics
from moray.engine.params import SamplingParams
from moray.engine.platform.cpus import available_cores
from moray.engine.request import Request

SHARD_ROWS = 16
MAX_SEQS = 16
KV_CACHE_BYTES = 26 << 20  # 3,328 tokens
CONTEXTS = 24
VOCAB_IN_USE = range(3, 32000)
NUM_ROWS = {"lengths": 240, "prefixes": 144, "neither": 144}
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=NUM_ROWS, default="lengths")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    config = EngineConfig(max_num_seqs=MAX_SEQS, kv_cache_memory=KV_CACHE_BYTES, num_threads=available_cores())
    checkpoint = str(write_checkpoint())
    executor = ShardExecutor(lambda: _load(checkpoint, config), _no_journal, _ignore_cleared)
    calls = shards_per_worker(-(-NUM_ROWS[args.load] // SHARD_ROWS), SHARD_ROWS, MAX_SEQS, 1)
    run(executor, make_rows("neither", -1)[: 2 * SHARD_ROWS], calls)  # warm-up
    pairs = []
    for n in range(args.pairs):
        rows = make_rows(args.load, n)
        of_job = run(executor, rows, calls)
        of_files = run(executor, rows, 2, in_order=True)
        assert of_files.pop("tokens") == of_job.pop("tokens"), "the order changed an answer"
        pairs.append({"files": of_files, "job": of_job})
        console.print(f"files {of_files}\njob   {of_job}")
    ratios = [round(pair["job"]["seconds"] / pair["files"]["seconds"], 3) for pair in pairs]
    console.print(f"{args.load}: the job's order takes {statistics.median(ratios):.2f} of the files' time ({ratios})")
    result = report.context("torch") | {"load": args.load, "calls": calls, "ratios": ratios, "pairs": pairs}
    console.print(f"Saved {report.save(f'bench_order-{args.load}', 'cpu', result).relative_to(report.ROOT)}")


def make_rows(load: str, pair: int) -> list[InFlightRow]:
    """Make the rows of a load. Their lengths are the same in every pair, their tokens are not."""
    lengths, tokens = random.Random(0), random.Random(pair)
    number = NUM_ROWS[load]
    contexts = [tokens.choices(VOCAB_IN_USE, k=0 if load == "lengths" else 160) for _ in range(CONTEXTS)]
    rows = []
    for index in range(number):
        is_long = load == "lengths" and lengths.random() < 1 / 16
        params = SamplingParams(max_tokens=160 if is_long else lengths.randint(4, 16), ignore_eos=True)
        context = index * CONTEXTS // number if load == "neither" else index % CONTEXTS
        prompt = contexts[context] + tokens.choices(VOCAB_IN_USE, k=lengths.randint(8, 24))
        rows.append(InFlightRow(index, Request("", prompt, params, index)))
    return rows


def run(executor: ShardExecutor, rows: Sequence[InFlightRow], calls: int, *, in_order: bool = False) -> dict[str, Any]:
    """Run the rows. Returns the seconds, cached and computed tokens, preemptions, steps, and the generated tokens.

    calls:     shards that the worker holds at once
    in_order:  True ignores the prefix cache when the next rows are chosen
    """
    engine, admission_lock = executor.engine, Lock()
    engine.reset_prefix_cache()
    vars(engine).pop("cached_prefix", None)
    if in_order:
        engine.cached_prefix = _never_cached  # type: ignore[method-assign]
    before = replace(engine.metrics)
    started = time.perf_counter()
    firsts = range(0, len(rows), SHARD_ROWS)
    runs = [InFlightShard(first // SHARD_ROWS, rows[first : first + SHARD_ROWS]) for first in firsts]

    def call(shard: InFlightShard) -> None:
        """Run a shard, as one of a worker's calls does."""
        with admission_lock:
            executor.wait_for_room()
            executor.start(shard)
        shard.wait()

    with ThreadPoolExecutor(calls) as pool:
        list(pool.map(call, runs))
    seconds = time.perf_counter() - started
    spent = Metrics(**{name: value - getattr(before, name) for name, value in vars(engine.metrics).items()})
    done = {index: completions for shard in runs for index, completions in shard.completions.items()}
    return {
        "seconds": round(seconds, 2),
        "hit_rate": round(spent.cached_tokens / spent.prompt_tokens, 3),
        "computed_tokens": spent.computed_tokens,
        "preemptions": spent.preemptions,
        "steps": spent.steps,
        "tokens": [done[index][0].token_ids for index in sorted(done)],
    }


def _never_cached(request: Request) -> Callable[[], int]:
    return lambda: 0


def _load(checkpoint: str, config: EngineConfig) -> Any:
    from moray.engine.engine import Engine

    return Engine(checkpoint, config)


def _no_journal(rows: Any, *, is_trial: bool) -> None:
    """Record nothing: the process does not crash."""


def _ignore_cleared(shard: int, row: int) -> None:
    """Do nothing: there are no suspects."""


if __name__ == "__main__":
    main()
