"""Measure long contexts on the CPU: prefill, decode and memory against length, and a short request beside a prefill.

    python benchmarks/bench_long_context.py [--lengths 1024,4096,131072] [--chunks 256,512,1024] [--threads 2] [--quick]

The model is one random layer in bf16 in which attention and the rest are in the proportion of Phi-3.5-MoE's: the keys
whose attention takes as many multiplications as the rest are 25,000 in both.

One prompt of the greatest length is computed, in the default chunks; its time and the growth of anonymous memory, the
KV cache aside, which is there before, are read when each length is reached. Then a request of each length, which the
prefix cache holds, generates some tokens.

Beside a prefill: a request that generates tokens, and a prompt of the greatest length that is computed from several
positions on, some steps from each, for each chunk size (engine.max_num_batched_tokens). "counted" is the engine as it
is, where a token far into a prompt counts as several; in "equal" each counts as one. Another short request comes in the
middle of each of these stretches.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from bench_model import write_checkpoint
from contender import anonymous_bytes
from line_chart import Panel, draw
from rich.console import Console

from moray.engine.config import EngineConfig
from moray.engine.core.limits import cache_bytes_per_token
from moray.engine.core.scheduler import EQUAL_COST
from moray.engine.core.step_limits import DEFAULTS
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request

SHAPE = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 8, "vocab_size": 2048, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = [1024 << n for n in range(8)]  # 1K .. 128K
DECODED = 32  # tokens that a request of each length generates
STARTS = 8  # positions from which a prompt is computed beside another request
STEPS = 13  # from each of them
SHORT_TOKENS = 16  # of a short prompt
LEAST_BYTES = 10_000  # drawn for less

console = Console(highlight=False)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), **SHAPE)
        longest = args.lengths[-1]
        before = anonymous_bytes()
        engine = make_engine(Path(folder), longest, args.threads)
        loaded = anonymous_bytes()
        prompt = random.Random(0).choices(range(3, SHAPE["vocab_size"]), k=longest)
        lengths = measure_lengths(engine, prompt, args.lengths)
        beside = measure_beside(engine, prompt, args.chunks)
    if args.quick:
        return
    result = report.context("torch") | {
        "threads": args.threads,
        "shape": SHAPE,
        "cache_bytes_per_token": cache_bytes_per_token(engine.model_config, engine.dtype.itemsize),
        "bytes_of_the_loaded_engine": loaded - before,
        "max_num_batched_tokens": DEFAULTS["cpu"].max_num_batched_tokens,
        "lengths": lengths,
        "beside": beside,
    }
    saved = report.save("long-context", "cpu", result)
    draw_figures(saved.with_suffix(".svg"), result)
    console.print(f"Saved {saved.relative_to(report.ROOT)} and its drawing")


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return sorted(int(number) for number in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=LENGTHS, metavar="N,N")
    parser.add_argument("--chunks", type=numbers, default=[256, 512, 1024], metavar="N,N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens and one chunk size; nothing is saved")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.chunks = [length for length in LENGTHS if length <= 8192], [512]
    return args


def make_engine(folder: Path, longest: int, threads: int) -> Engine:
    """Return an engine whose cache holds two prompts of the greatest length: a measured one, and its prefixes."""
    engine = Engine(str(folder), EngineConfig(device="cpu", kv_cache_memory=1 << 20, num_threads=threads))
    per_token = cache_bytes_per_token(engine.model_config, engine.dtype.itemsize)
    memory = 2 * (longest + 4096) * per_token
    config = EngineConfig(device="cpu", kv_cache_memory=memory, num_threads=threads, longrope="static")
    return Engine(str(folder), config)


def measure_lengths(engine: Engine, prompt: list[int], lengths: list[int]) -> list[dict[str, Any]]:
    """Return time and memory of the prefill when each length is reached, and the speed of decoding there."""
    before, computed_before = anonymous_bytes(), engine.metrics.computed_tokens
    engine.add(Request("long", prompt, SamplingParams(max_tokens=0)))
    found: list[dict[str, Any]] = []
    started, peak = time.perf_counter(), 0
    left = list(lengths)
    while engine.has_work:
        step_started = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        peak = max(peak, anonymous_bytes() - before)
        while left and engine.metrics.computed_tokens - computed_before >= left[0]:
            step_s = now - step_started
            found.append({"length": left.pop(0), "prefill_s": now - started, "step_s": step_s, "memory_bytes": peak})
    for row in found:
        prefix = prompt[: row["length"] - DECODED]
        engine.add(Request("decode", prefix, SamplingParams(max_tokens=DECODED, ignore_eos=True)))
        engine.step()  # the last block of the prompt, and the first token
        step_started = time.perf_counter()
        while engine.has_work:
            engine.step()
        row["decode_s"] = (time.perf_counter() - step_started) / (DECODED - 1)
        console.print(
            f"{row['length']:>7,}: prefill {row['prefill_s']:.1f} s, its last step {row['step_s'] * 1e3:.0f} ms, "
            f"{row['memory_bytes'] / 1e6:.1f} MB more; decode {1 / row['decode_s']:.0f} tokens/s"
        )
    return found


def measure_beside(engine: Engine, prompt: list[int], chunks: list[int]) -> list[dict[str, Any]]:
    """Return what a short request beside a long prefill waits for its tokens, for each chunk size and way to count."""
    scheduler, counted = engine._scheduler, engine._scheduler.token_cost
    found = []
    for chunk in chunks:
        for name, cost in (("equal", EQUAL_COST), ("counted", counted)):
            scheduler.max_num_batched_tokens, scheduler.token_cost = chunk, cost
            waits: list[tuple[int, float]] = []
            firsts: list[float] = []
            tokens_before, started = engine.metrics.computed_tokens, time.perf_counter()
            for start in range(0, len(prompt), len(prompt) // STARTS):
                run_beside(engine, prompt, start, f"{chunk} {name} {start}", waits, firsts)
            seconds = time.perf_counter() - started
            ordered = sorted(wait for _, wait in waits)
            row: dict[str, Any] = {
                "chunk": chunk,
                "cost": name,
                "prompt_tokens_per_s": (engine.metrics.computed_tokens - tokens_before) / seconds,
                "p50_s": statistics.median(ordered),
                "p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
                "first_token_s": {"median": statistics.median(firsts), "longest": max(firsts)},
                "median_by_position": [
                    (position, statistics.median(wait for at, wait in waits if at == position))
                    for position in sorted({at for at, _ in waits})
                ],
            }
            found.append(row)
            console.print(
                f"chunks of {chunk}, {name}: {row['prompt_tokens_per_s']:.0f} prompt tokens/s; a token every "
                f"{row['p50_s'] * 1e3:.0f} ms (p50), {row['p99_s'] * 1e3:.0f} ms (p99); another's first token after "
                f"{max(firsts) * 1e3:.0f} ms at most"
            )
    return found


def run_beside(
    engine: Engine, prompt: list[int], start: int, seed: str, waits: list[tuple[int, float]], firsts: list[float]
) -> None:
    """Compute some chunks of a long prompt from `start` on, beside a request that gets a token in each step.

    seed: of the tokens after `start`, which no other call has: the prefix cache must not hold them
    """
    short = SamplingParams(max_tokens=4 * STEPS, ignore_eos=True)
    engine.add(Request("short", prompt[-SHORT_TOKENS:], short))
    engine.step()
    rest = random.Random(seed).choices(range(3, SHAPE["vocab_size"]), k=len(prompt) - start - 1)
    engine.add(Request("long", prompt[:start] + rest, SamplingParams(max_tokens=1)))
    engine.step()
    came = 0.0
    for step in range(STEPS):
        if step == STEPS // 2:
            other = random.Random(f"other {seed}").choices(range(3, SHAPE["vocab_size"]), k=SHORT_TOKENS)
            engine.add(Request("other", other, SamplingParams(max_tokens=1, ignore_eos=True)))
            came = time.perf_counter()
        step_started = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        assert any(output.request_id == "short" for output in outputs), "a short request got no token"
        waits.append((start, now - step_started))
        if any(output.request_id == "other" for output in outputs):
            firsts.append(now - came)
    for request_id in ("short", "long", "other"):
        engine.abort(request_id)


def draw_figures(file: Path, result: dict[str, Any]) -> None:
    """Draw speed, memory and the waiting of a short request."""
    lengths, per_token = result["lengths"], result["cache_bytes_per_token"]

    def curve(value: str) -> list[tuple[int, float]]:
        return [(row["length"], row[value]) for row in lengths]

    draw(
        file,
        "Long contexts on the CPU",
        [
            Panel(
                "Seconds by length of the prompt",
                {
                    "prefill, in all": curve("prefill_s"),
                    "its last step": curve("step_s"),
                    "a decode step": curve("decode_s"),
                },
                lambda s: f"{s:g} s",
            ),
            Panel(
                "Memory by length of the prompt",
                {
                    "its KV cache": [(row["length"], row["length"] * per_token) for row in lengths],
                    "what else grew": [(length, max(grown, LEAST_BYTES)) for length, grown in curve("memory_bytes")],
                },
                lambda n: f"{n / 1e6:g} MB",
            ),
            Panel(
                "A short request's wait for its next token, by the position of a prefill beside it",
                {
                    f"{row['chunk']}, {row['cost']}": [(max(at, 1024), wait) for at, wait in row["median_by_position"]]
                    for row in result["beside"]
                },
                lambda s: f"{s * 1e3:g} ms",
            ),
        ],
    )


if __name__ == "__main__":
    main()
