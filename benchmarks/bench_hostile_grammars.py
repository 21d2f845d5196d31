"""Send hostile grammars to an endpoint while a bystander streams: none may crash it, and none may hold others up.

    python benchmarks/bench_hostile_grammars.py [--url URL --model NAME] [--seconds 20] [--clients 4] [--name FILE]

Without --url it starts `moray serve` of the small model of examples/. Three phases of the same length, each with a
bystander who streams free text: alone; beside clients that send grammars of ordinary schemas, one after the other; and
beside as many that send the hostile ones. The figure is the gap between two tokens of the bystander: p50, p99 and the
longest, and his tokens a second. Every grammar must be answered, with 200 or with 400 and a code, in its time.
"""

import argparse
import asyncio
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import aiohttp
import report
from rich.console import Console
from rich.table import Table

TIMEOUT_S = 120
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of an endpoint that runs")
    parser.add_argument("--model", default="tiny-phimoe")
    parser.add_argument("--seconds", type=float, default=20, help="of each phase")
    parser.add_argument("--clients", type=int, default=4, help="that send grammars")
    parser.add_argument("--name", help="of the results' file; none = write none")
    args = parser.parse_args()
    with endpoint() if args.url is None else given(args.url) as url:
        phases = asyncio.run(run(url, args))
    show(phases)
    if args.name:
        result = report.context("llguidance", "ray") | {"arguments": vars(args), "phases": phases}
        console.print(f"written: {report.save(args.name, 'cpu', result)}")
    raise SystemExit(any(phase["failures"] for phase in phases.values()))


def ordinary() -> dict[str, dict[str, Any]]:
    """Return bodies' fields of ordinary requests."""
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
    }
    return {
        "person": {"response_format": {"type": "json_schema", "json_schema": {"schema": person}}},
        "label": {"structured_outputs": {"choice": ["yes", "no"]}},
        "date": {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}"}},
    }


def hostile() -> dict[str, dict[str, Any]]:
    """Return bodies' fields of hostile requests, each of which would cost a careless server its time or its life."""

    def nest(levels: int, wrap: Any, inner: Any) -> Any:
        return reduce(lambda value, _: wrap(value), range(levels), inner)

    schemas: dict[str, Any] = {
        "deep objects": nest(200, lambda one: {"type": "object", "properties": {"a": one}}, {}),
        "deeper than parsers go": nest(400, lambda one: {"items": one}, {}),
        "enum of 20,000": {"enum": [f"value {i}" for i in range(18_000)]},
        "enum of long texts": {"enum": ["x" * 1000 + str(i) for i in range(200)]},
        "2,000 optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}},
        "10,000 optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(10_000)}},
        "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
        "long text": {"type": "string", "minLength": 10**9},
        "endless bound": {"type": "string", "maxLength": 10**30},
        "large numbers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
        "multiples": {"type": "number", "multipleOf": 1e-200},
        "catastrophic pattern": {"type": "string", "pattern": "^(a+)+(a+)+(a+)+$"},
        "counted pattern": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        "pattern with a long tail": {"type": "string", "pattern": "^(a|b)*a(a|b){800}$"},
        "many patterns": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]},
        "recursion": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        "mutual recursion": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]},
                                                              "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
        "exponential references": {"$ref": "#/$defs/d30", "$defs": {"d0": {"type": "string"}} | {
            f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i - 1}"}] * 2, "minItems": 2}
            for i in range(1, 31)}},
        "exponential allOf": {"$ref": "#/$defs/d20", "$defs": {"d0": {"minimum": 0}} | {
            f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, 21)}},
        "large anyOf": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}, "required": [f"k{i}"]}
                                  for i in range(1500)]},
        "distant reference": {"$ref": "http://127.0.0.1:1/schema.json"},
        "half a character": {"enum": ["\ud800"]},
        "unknown keyword": {"not": {"type": "string"}},
        "not a schema": {"type": "objekt"},
        "properties of the wrong type": {"properties": [1, 2]},
    }  # fmt: skip
    outputs: dict[str, Any] = {
        "regex: parentheses": {"regex": "(" * 2000 + "a" + ")" * 2000},
        "regex: backreference": {"regex": r"(a)\1"},
        "regex: look ahead": {"regex": "(?=a)a"},
        "regex: repetitions of repetitions": {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
        "regex: doubling": {"regex": "(x+x+)+y"},
        "regex: long classes": {"regex": r"[\p{L}\p{N}]{1,50000}"},
        "regex: alternatives": {"regex": "|".join(f"{i}a*b*c*" for i in range(5000))},
        "choice of 10,000": {"choice": [f"choice number {i}" for i in range(10_000)]},
        "grammar: ambiguous": {"grammar": 'start: e\ne: e "+" e | e e | "a"?\n'},
        "grammar: left recursion": {"grammar": 'start: start "a" | "b"\n'},
        "grammar: no end": {"grammar": 'start: "a" start\n'},
        "grammar: 5,000 rules": {"grammar": "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(5000))
                                 + 'r5000: "c"\n'},
        "grammar: alternatives": {"grammar": "start: " + " | ".join(f'"word {i}"' for i in range(8000)) + "\n"},
        "grammar: GBNF of 700 rules": {"grammar": "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(700))
                                       + 'r700 ::= "b"\nroot ::= r0\n'},
        "grammar: GBNF that is none": {"grammar": "root ::= ((((" * 500},
        "grammar: bytes": {"grammar": "start: /\\xff\\xfe/\n"},
        "json: not JSON": {"json": "{" * 1000},
        "json: NaN": {"json": '{"minimum": NaN}'},
    }  # fmt: skip
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "parameters": {
            "type": "object", "properties": {f"p{j}": {"type": "string"} for j in range(50)}}}}
        for i in range(60)
    ]  # fmt: skip
    return (
        {name: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
         for name, schema in schemas.items()}
        | {name: {"structured_outputs": value} for name, value in outputs.items()}
        | {"tools: 60 of 50 properties": {"tools": tools, "tool_choice": "required"}}
    )  # fmt: skip


async def run(url: str, args: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    phases = {}
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        warm_s = time.monotonic() + 2
        await stream(session, args.model, lambda: time.monotonic() < warm_s)  # what is slow at first
        for name, fields in (("alone", {}), ("ordinary grammars", ordinary()), ("hostile grammars", hostile())):
            phases[name] = await run_phase(session, fields, args)
            console.print(f"{name}: {phases[name]['answers']}")
    return phases


async def run_phase(session: aiohttp.ClientSession, fields: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Let a bystander stream beside clients that send each of these requests, again and again until the time is up."""
    end_s, answers, left = time.monotonic() + args.seconds, Answers(), itertools.cycle(fields.items())

    def is_unfinished() -> bool:
        """Return whether the time is not up, or not every request was sent once."""
        return time.monotonic() < end_s or answers.num_asked < len(fields)

    async def send_all() -> None:
        while fields and is_unfinished():
            await answers.ask(session, args.model, *next(left))

    async with asyncio.TaskGroup() as group:
        bystander = group.create_task(stream(session, args.model, is_unfinished))
        for _ in range(args.clients):
            group.create_task(send_all())
    gaps = sorted(bystander.result())
    slowest = sorted(answers.seconds.items(), key=lambda one: -one[1])[:8]
    return {
        "gap_ms": {"p50": ms(statistics.median(gaps)), "p99": ms(gaps[int(0.99 * len(gaps))]), "max": ms(gaps[-1])},
        "tokens_per_s": round(len(gaps) / sum(gaps), 1),
        "answers": dict(answers.counts),
        "slowest_ms": {name: ms(seconds) for name, seconds in slowest},
        "failures": answers.failures,
    }


class Answers:
    """Counts how requests with grammars were answered."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.failures: list[str] = []

    async def ask(self, session: aiohttp.ClientSession, model: str, name: str, fields: Any) -> None:
        """Send a request. A schema has a number in it, so that the endpoint does not know it from before."""
        self.num_asked += 1
        body = {"model": model, "messages": [{"role": "user", "content": "Go."}], "max_tokens": 16, **fields}
        schema = fields.get("response_format", {}).get("json_schema", {}).get("schema")
        if isinstance(schema, dict):
            schema = schema | {"$comment": str(self.num_asked)}
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        started = time.monotonic()
        try:
            async with session.post("/v1/chat/completions", json=body) as reply:
                text = await reply.text()
                status = reply.status
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{name}: {type(error).__name__}")
            return
        self.seconds[name] = max(self.seconds.get(name, 0), time.monotonic() - started)
        code = "" if status == 200 else f" {json.loads(text)['error']['code']}"
        self.counts[f"{status}{code}"] += 1
        if status not in (200, 400, 429, 503):
            self.failures.append(f"{name}: {status} {text[:200]}")


async def stream(session: aiohttp.ClientSession, model: str, is_unfinished: Callable[[], bool]) -> list[float]:
    """Stream free text as long as that is so, and return the gaps between its tokens, in seconds."""
    body = {"model": model, "prompt": "In", "max_tokens": 1000, "ignore_eos": True, "temperature": 1, "stream": True}
    gaps: list[float] = []
    while is_unfinished():
        async with session.post("/v1/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            last_s = None
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    now_s = time.monotonic()
                    gaps += [] if last_s is None else [now_s - last_s]
                    last_s = now_s
                if not is_unfinished():
                    break
    return gaps


def ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


def show(phases: dict[str, Any]) -> None:
    table = Table("the bystander", "gap p50 ms", "p99", "max", "tokens/s", "answers")
    for name, phase in phases.items():
        gap = phase["gap_ms"]
        row = (name, gap["p50"], gap["p99"], gap["max"], phase["tokens_per_s"], sum(phase["answers"].values()))
        table.add_row(*map(str, row))
    console.print(table)
    for name, phase in phases.items():
        console.print(f"{name}: slowest ms {phase['slowest_ms']}; failures {phase['failures']}", markup=False)


@contextmanager
def given(url: str) -> Iterator[str]:
    yield url


@contextmanager
def endpoint() -> Iterator[str]:
    """Start `moray serve` of the small model, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moray")), "serve", "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, "moray serve ended"
            try:
                urllib.request.urlopen(f"{url}/ready").close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
