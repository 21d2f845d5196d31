"""Compare the endpoint with the engine alone and `transformers serve`; and interactive requests with and without bulk.

    python benchmarks/bench_serve.py [--concurrency 1,8,32,128] [--rounds 2] [--seconds 30] [--peers all|none] [--quick]

Overhead: the same requests (16..128 prompt, 8..96 output tokens, streamed) in a closed loop through the engine in a
process of its own, through `moray serve`, and through `transformers serve --continuous-batching`. Time to first token
(TTFT) and output tokens/s. Interactive: short requests at random times (an open loop), on the idle endpoint, during
the load of 64 bulk clients of the same priority, and during that of bulk clients of service_tier "flex".

Model: the random bf16 Phi-MoE of bench_model.py. The clients run on the same machine, on the same cores. The peer needs
`pip install accelerate`.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from bench_model import add_tokenizer, write_checkpoint
from http_load import Client, LoadRequest, LoadResult, make_requests
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
MAX_SEQS = 64
BULK_CLIENTS = 64
INTERACTIVE_PER_S = 1.0
EXACT = {"ignore_eos": True}  # transformers has no such field; its answers may be shorter, and are counted as they are
console = Console(highlight=False)


def main() -> None:
    args = parse_arguments()
    folder = add_tokenizer(write_checkpoint(args.folder))
    console.print(f"logs: {args.logs}")
    figures: dict[str, Any] = {"closed loop": {}, "interactive": {}}
    with engine_alone(folder, args.logs) as engine:
        figures["closed loop"]["engine"] = {
            c: [engine(list(make_requests(num_requests(c, args), r, EXACT)), c) for r in range(args.rounds)]
            for c in args.concurrency
        }
    with endpoint(moray_command(folder), args.logs / "moray.log") as url:
        figures["closed loop"]["moray serve"] = asyncio.run(closed_loops(url, folder.name, args, EXACT))
        figures["interactive"] = asyncio.run(interactive(url, folder.name, args))
    if args.peers != "none":
        theirs = write_transformers_folder(folder)
        with endpoint(transformers_command(theirs), args.logs / "transformers.log") as url:
            figures["closed loop"]["transformers serve"] = asyncio.run(closed_loops(url, str(theirs), args, {}))
    summary = {
        "closed loop": {
            name: {c: summarize(rounds) for c, rounds in by_size.items()}
            for name, by_size in figures["closed loop"].items()
        },
        "interactive": figures["interactive"],
    }
    show(summary)
    if not args.quick:
        arguments = {key: str(value) for key, value in vars(args).items()}
        result = report.context("torch", "transformers", "ray") | {"arguments": arguments}
        console.print(f"written: {report.save('bench_serve', 'cpu', result | summary)}")


def num_requests(concurrency: int, args: argparse.Namespace) -> int:
    return max(4 if args.quick else 16, concurrency if args.quick else 2 * concurrency)


async def closed_loops(url: str, model: str, args: argparse.Namespace, more: dict[str, Any]) -> dict[int, Any]:
    async with Client(url, model) as client:
        await client.closed_loop(make_requests(4, -1, more), 2)  # warm-up
        return {
            c: [await client.closed_loop(make_requests(num_requests(c, args), r, more), c) for r in range(args.rounds)]
            for c in args.concurrency
        }


async def interactive(url: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return for each situation the TTFT of interactive requests and the tokens/s of the bulk."""
    found: dict[str, Any] = {}
    async with Client(url, model) as client:
        for round_id, (name, tier) in enumerate(
            [("idle", None), ("bulk alone", "flex"), ("bulk of the same rank", "default"), ("bulk as flex", "flex")]
        ):
            bulk = Bulk(client, tier, 10 + round_id)
            async with asyncio.TaskGroup() as group:
                if tier is not None:
                    group.create_task(bulk.run())
                    await asyncio.sleep(0.2 * args.seconds)  # until it fills the engine
                started, tokens = time.monotonic(), await generated_tokens(url)
                number = 0 if name == "bulk alone" else int(args.seconds * INTERACTIVE_PER_S)
                requests = make_requests(number, 20 + round_id, EXACT, "short")
                short = await client.open_loop(requests, INTERACTIVE_PER_S)
                if not short:
                    await asyncio.sleep(args.seconds)
                seconds = time.monotonic() - started
                tokens = await generated_tokens(url) - tokens - sum(one.tokens for one in short)
                found[name] = {"bulk_tokens_per_s": tokens / seconds, "requests": len(short)} | latencies(short)
                bulk.is_over = True
    return found


async def generated_tokens(url: str) -> int:
    """Return how many tokens the endpoint has generated so far, including those of running requests."""

    def read() -> int:
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return next(int(float(line.split()[1])) for line in lines if line.startswith("moray_generated_tokens_total "))

    return await asyncio.to_thread(read)


class Bulk:
    """Runs bulk clients in a closed loop until `is_over` is set."""

    def __init__(self, client: Client, tier: str | None, round_id: int) -> None:
        self.is_over = False
        self._client = client
        self._requests = make_requests(1_000_000, round_id, EXACT | {"service_tier": tier})

    async def run(self) -> None:
        await asyncio.gather(*(self._work() for _ in range(BULK_CLIENTS)))

    async def _work(self) -> None:
        while not self.is_over:
            await self._client.send(next(self._requests))


def summarize(rounds: Sequence[Sequence[LoadResult]]) -> dict[str, Any]:
    """Return the figures of the fastest round, which other processes disturbed least."""
    rates = [tokens_per_s(results) for results in rounds]
    best = rounds[rates.index(max(rates))]
    return {"tokens_per_s": max(rates), "tokens_per_s_of_rounds": rates, "requests": len(best)} | latencies(best)


def tokens_per_s(results: Sequence[LoadResult]) -> float:
    seconds = max(one.started_s + one.seconds for one in results) - min(one.started_s for one in results)
    return sum(one.tokens for one in results) / seconds


def latencies(results: Sequence[LoadResult]) -> dict[str, float]:
    if len(results) < 2:
        return {}
    first = [1000 * one.first_s for one in results]
    percentiles = statistics.quantiles(first, n=100, method="inclusive")
    return {"ttft_p50_ms": percentiles[49], "ttft_p99_ms": percentiles[98], "ttft_min_ms": min(first)}


@contextmanager
def engine_alone(folder: Path, logs: Path) -> Iterator[Any]:
    """Start the engine in a process of its own; yield a function that runs requests there and returns the results."""
    with (logs / "engine.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, HERE / "run_engine_load.py", folder, str(MAX_SEQS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(requests: list[LoadRequest], concurrency: int) -> list[LoadResult]:
        stdin.write(json.dumps({"requests": list(map(asdict, requests)), "concurrency": concurrency}) + "\n")
        stdin.flush()
        return [LoadResult(**one) for one in json.loads(stdout.readline())]

    try:
        stdout.readline()
        run(list(make_requests(4, -1, EXACT)), 2)  # warm-up
        yield run
    finally:
        stdin.close()
        process.wait(60)


def moray_command(folder: Path) -> list[str]:
    moray = Path(sys.executable).with_name("moray")
    return [str(moray), "serve", "--model", str(folder), "--set", f"max_num_seqs={MAX_SEQS}", "--port"]


def write_transformers_folder(folder: Path) -> Path:
    """Return a folder of the same model whose config.json has transformers' own name of the architecture."""
    copy = folder.with_name(f"{folder.name}-transformers")
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != "config.json" and not (copy / path.name).exists():
            (copy / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["PhimoeForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return copy


def transformers_command(folder: Path) -> list[str]:
    program = str(Path(sys.executable).with_name("transformers"))
    # by default the cache would take most of the machine's memory
    cache = ["--cb-block-size", "32", "--cb-num-blocks", str(8 * 128)]
    return [program, "serve", str(folder), "--continuous-batching", *cache, "--device", "cpu", "--port"]


@contextmanager
def endpoint(command: list[str], log: Path) -> Iterator[str]:
    """Start a server, whose command ends with its port, wait until it is healthy, and stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, str(port)], stdout=output, stderr=output, env=environment)
    try:
        give_up = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise SystemExit(f"{command[0]} does not serve; see {log}") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)


def show(summary: dict[str, Any]) -> None:
    table = Table("closed loop", "clients", "tokens/s", "TTFT p50 ms", "p99 ms")
    for name, by_size in summary["closed loop"].items():
        for c, f in by_size.items():
            table.add_row(
                name, str(c), f"{f['tokens_per_s']:.0f}", f"{f['ttft_p50_ms']:.1f}", f"{f['ttft_p99_ms']:.1f}"
            )
    console.print(table)
    table = Table("interactive requests during", "TTFT p50 ms", "p99 ms", "bulk tokens/s")
    for name, f in summary["interactive"].items():
        p50, p99 = (f"{f[k]:.1f}" if k in f else "" for k in ("ttft_p50_ms", "ttft_p99_ms"))
        table.add_row(name, p50, p99, f"{f['bulk_tokens_per_s']:.0f}")
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=lambda text: list(map(int, text.split(","))), default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each interactive situation")
    parser.add_argument("--peers", choices=["all", "none"], default="all")
    parser.add_argument("--quick", action="store_true", help="few requests; the figures are not kept")
    parser.add_argument("--folder", type=Path, default=None, help="where the model is; made where it is not")
    parser.add_argument("--logs", type=Path, default=None)
    args = parser.parse_args()
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="moray-bench-"))
    return args


if __name__ == "__main__":
    main()
