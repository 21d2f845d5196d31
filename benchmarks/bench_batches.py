"""Measure batches: interactive requests beside one, memory while a large one runs, and how fast a file is checked.

    python benchmarks/bench_batches.py [--lines 50000] [--seconds 30] [--parts check,interactive,memory] [--quick]

check: a file of `lines` requests of about 1.5 KB through check_lines, in MB/s, with the memory that it takes.
interactive: short requests at random times (an open loop), on the idle endpoint, beside clients that send requests of
service_tier "flex" one by one, and beside a running batch. Those have 16..128 prompt and 8..96 output tokens.
memory: `lines` requests of one output token, from the upload to the output file; the resident memory of replica and
coordinator every second, and requests/s.

Model: the random bf16 Phi-MoE of bench_model.py for `interactive`, the small model of examples/ for `memory`, where
requests should cost little. Everything runs on the same machine, on the same cores.
"""

import argparse
import asyncio
import json
import random
import re
import resource
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import report
from bench_model import add_tokenizer, write_checkpoint
from bench_serve import EXACT, INTERACTIVE_PER_S, Bulk, console, endpoint, generated_tokens, latencies, moray_command
from http_load import Client, make_requests

from moray.jobs.batches.lines import read_lines
from moray.jobs.batches.validate import Rules, check_lines

URL = "/v1/completions"
TINY = report.ROOT / "examples" / "tiny-phimoe"
FINAL = ("completed", "failed", "expired", "cancelled")
PARTS = ("check", "interactive", "memory")


def main() -> None:
    args = parse_arguments()
    console.print(f"logs: {args.logs}")
    found: dict[str, Any] = {}
    if "check" in args.parts:
        found["check"] = check(args.lines)
    if "interactive" in args.parts:
        folder = add_tokenizer(write_checkpoint(args.folder))
        with batch_endpoint(folder, args.logs) as url:
            found["interactive"] = asyncio.run(interactive(url, folder.name, args.seconds))
    if "memory" in args.parts:
        with batch_endpoint(TINY, args.logs) as url:
            found["memory"] = memory(url, args.lines)
    console.print_json(json.dumps(found))
    if not args.quick:
        arguments = {key: str(value) for key, value in vars(args).items() if key != "logs"}
        result = report.context("torch", "ray") | {"arguments": arguments} | found
        console.print(f"written: {report.save('bench_batches', 'cpu', result)}")


def check(num_lines: int) -> dict[str, float]:
    """Return how fast a file is checked, and how much memory that takes, in MB."""
    letters = random.Random(0)
    text = "".join(letters.choices("abcdefgh ", k=1400))
    rules = Rules((URL,), "m", num_lines, 8 << 20)
    with tempfile.TemporaryFile() as file:
        for number in range(num_lines):
            file.write(line(number, {"model": "m", "prompt": text, "max_tokens": 8}))
        megabytes = file.tell() / 1e6
        file.seek(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, started_cpu = time.perf_counter(), time.process_time()
        checked = check_lines(read_lines(file, rules.max_line_bytes), rules)
        seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not checked.errors and len(checked.offsets) == num_lines
    return {
        "lines": num_lines,
        "mb": megabytes,
        "mb_per_s": megabytes / seconds,
        "mb_per_s_of_cpu": megabytes / cpu,
        "grown_mb": grown / 1000,
    }


def line(number: int, body: dict[str, Any]) -> bytes:
    value = {"custom_id": f"request-{number}", "method": "POST", "url": URL, "body": body}
    return json.dumps(value).encode() + b"\n"


async def interactive(url: str, model: str, seconds: float) -> dict[str, Any]:
    """Return the TTFT of interactive requests and the tokens/s of what runs beside them, in each situation."""
    found: dict[str, Any] = {}
    number = int(seconds * INTERACTIVE_PER_S)
    async with Client(url, model) as client:
        await client.closed_loop(make_requests(4, -1, {}), 2)  # warm-up
        for round_id, (name, beside) in enumerate(SITUATIONS.items()):
            async with beside(url, model, client):
                if beside is not nothing:
                    await asyncio.sleep(0.2 * seconds)  # until it fills the engine
                started, tokens = time.monotonic(), await generated_tokens(url)
                requests = make_requests(number, 20 + round_id, EXACT, "short")
                results = await client.open_loop(requests, INTERACTIVE_PER_S)
                tokens = await generated_tokens(url) - tokens - sum(one.tokens for one in results)
                rate = tokens / (time.monotonic() - started)
                found[name] = {"requests": len(results), "tokens_per_s_beside": rate} | latencies(results)
    return found


@asynccontextmanager
async def nothing(url: str, model: str, client: Client) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def flex_clients(url: str, model: str, client: Client) -> AsyncIterator[None]:
    """Keep as many requests of service_tier "flex" in flight as bench_serve.py."""
    bulk = Bulk(client, "flex", 10)
    async with asyncio.TaskGroup() as group:
        group.create_task(bulk.run())
        yield
        bulk.is_over = True


@asynccontextmanager
async def running_batch(url: str, model: str, client: Client) -> AsyncIterator[None]:
    """Run a batch; cancel it at the end."""
    batch = await asyncio.to_thread(start_batch, url, model)
    while (await asyncio.to_thread(get, url, batch))["status"] == "validating":
        await asyncio.sleep(0.1)
    yield
    await asyncio.to_thread(call, f"{url}/v1/batches/{batch}/cancel", b"")
    while (await asyncio.to_thread(get, url, batch))["status"] not in FINAL:
        await asyncio.sleep(0.2)


SITUATIONS: dict[str, Callable[[str, str, Client], AbstractAsyncContextManager[None]]] = {
    "idle": nothing,
    "beside flex clients": flex_clients,
    "beside a batch": running_batch,
    "idle again": nothing,
}


def start_batch(url: str, model: str) -> str:
    """Start a batch that is longer than the measurement."""
    requests = make_requests(20_000, 5, {})
    content = b"".join(
        line(number, {"model": model, "prompt": one.prompt, "max_tokens": one.max_tokens, "ignore_eos": True})
        for number, one in enumerate(requests)
    )
    return create(url, content)


def memory(url: str, num_lines: int) -> dict[str, Any]:
    """Return the memory of the endpoint's processes while a large batch runs, and how fast it ran."""
    content = b"".join(
        line(number, {"model": TINY.name, "prompt": f"The sum of {number} and 16 is", "max_tokens": 1})
        for number in range(num_lines)
    )
    before = rss_mb()
    started = time.monotonic()
    batch_id = create(url, content)
    uploaded_s = time.monotonic() - started
    samples: list[dict[str, float]] = []
    states: dict[str, float] = {}
    while True:
        batch = get(url, batch_id)
        states.setdefault(batch["status"], time.monotonic() - started)
        sample = {"s": round(time.monotonic() - started, 1), "done": batch["request_counts"]["completed"]}
        samples.append(sample | rss_mb())
        if batch["status"] in FINAL:
            break
        time.sleep(1)
    size = sum(len(block) for block in read_file(url, batch["output_file_id"]))
    after = rss_mb()
    tenth = max(1, len(samples) // 10)
    return {
        "requests": num_lines,
        "upload_mb": len(content) / 1e6,
        "upload_s": uploaded_s,
        "output_mb": size / 1e6,
        "states_s": states,
        "requests_per_s": num_lines / (states[batch["status"]] - states["in_progress"]),
        "counts": batch["request_counts"],
        "rss_mb": {"before": before, "after": after} | {
            name: {
                "first tenth": statistics.median(one[name] for one in samples[:tenth]),
                "last tenth": statistics.median(one[name] for one in samples[-tenth:]),
                "most": max(one[name] for one in samples),
            }
            for name in before
        },
        "samples": samples[:: max(1, len(samples) // 60)],
    }  # fmt: skip


def rss_mb() -> dict[str, float]:
    """Return the resident memory of the replica and of the coordinator on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().replace("\0", " ")
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        match = re.match(r"ray::ServeReplica:[^:]*:(moray|batches)\b", command)
        if match is not None:
            found["endpoint" if match[1] == "moray" else "coordinator"] = pages * 4096 / 1e6
    return found


def batch_endpoint(model: Path, logs: Path) -> Any:
    """Start an endpoint with batches; its store is in the folder of the logs."""
    *command, port = moray_command(model)
    store = tempfile.mkdtemp(prefix="store-", dir=logs)
    return endpoint([*command, "--batches", store, port], logs / f"{model.name}.log")


def create(url: str, content: bytes) -> str:
    """Upload a file and return the id of a batch of it."""
    boundary = "moray-bench"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{boundary}\r\n'
        'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    file = call(f"{url}/v1/files", body, f"multipart/form-data; boundary={boundary}")
    wanted = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
    batch_id: str = call(f"{url}/v1/batches", json.dumps(wanted).encode())["id"]
    return batch_id


def call(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())


def get(url: str, batch_id: str) -> Any:
    return call(f"{url}/v1/batches/{batch_id}")


def read_file(url: str, file_id: str) -> Iterator[bytes]:
    with urllib.request.urlopen(f"{url}/v1/files/{file_id}/content", timeout=600) as reply:
        while block := reply.read(1 << 20):
            yield block


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each interactive situation")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="the figures are not kept")
    parser.add_argument("--folder", type=Path, default=None, help="where the model is; made where it is not")
    parser.add_argument("--logs", type=Path, default=None)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: must be of {', '.join(PARTS)}")
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="moray-bench-"))
    return args


if __name__ == "__main__":
    main()
