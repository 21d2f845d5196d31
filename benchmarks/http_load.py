"""Put load on an OpenAI endpoint: clients that send streamed completions and measure times.

The clients run in the caller's event loop, on the machine of the endpoint: the figures include their cost.
"""

import asyncio
import json
import random
import string
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class LoadRequest:
    """Describes a request. more: further fields of the body, such as service_tier"""

    prompt: str
    max_tokens: int
    more: dict[str, Any]


@dataclass(frozen=True)
class LoadResult:
    """Holds the times of a request, in seconds, and its tokens.

    started_s:  when it was sent, by time.monotonic()
    first_s:    until the first text came
    seconds:    until it ended
    """

    started_s: float
    first_s: float
    seconds: float
    tokens: int


class Client:
    """Sends completions to an endpoint."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, request: LoadRequest) -> LoadResult:
        """Send a request and read its stream. Raises RuntimeError where the endpoint answers with something else."""
        body = {
            "model": self._model, "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **request.more,
        }  # fmt: skip
        started, first, chunks, usage = time.monotonic(), 0.0, 0, 0
        async with self._session.post(f"{self._url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{self._url} answered {reply.status}: {(await reply.text())[:500]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event.get("usage"):
                    usage = event["usage"]["completion_tokens"]
                if any(choice["text"] for choice in event["choices"]):
                    chunks += 1
                    first = first or time.monotonic() - started
        return LoadResult(started, first, time.monotonic() - started, usage or chunks)

    async def closed_loop(self, requests: Iterable[LoadRequest], concurrency: int) -> list[LoadResult]:
        """Run `concurrency` clients, each of which sends its next request when the last one is answered."""
        left = iter(requests)

        async def work() -> list[LoadResult]:
            return [await self.send(request) for request in left]

        return [results for each in await asyncio.gather(*(work() for _ in range(concurrency))) for results in each]

    async def open_loop(self, requests: Iterable[LoadRequest], per_s: float) -> list[LoadResult]:
        """Send requests at random times (a Poisson process), whether or not others are answered."""
        gaps = random.Random(0)
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request in requests:
                tasks.append(group.create_task(self.send(request)))
                await asyncio.sleep(gaps.expovariate(per_s))
        return [task.result() for task in tasks]


def make_requests(number: int, round_id: int, more: dict[str, Any], shape: str = "mixed") -> Iterator[LoadRequest]:
    """Make requests: `mixed` have 16..128 prompt and 8..96 output tokens, `short` ones 32 and 8.

    A letter is a token of bench_model's tokenizer. No two rounds share a prompt.
    """
    lengths, letters = random.Random(0), random.Random(1000 + round_id)
    for _ in range(number):
        prompt, output = (lengths.randint(16, 128), lengths.randint(8, 96)) if shape == "mixed" else (32, 8)
        yield LoadRequest("".join(letters.choices(string.ascii_lowercase, k=prompt)), output, more)
