"""Load on an OpenAI endpoint: clients that send completions as streams and look at the clock.

The clients run in the caller's event loop, on the machine of the endpoint: what they cost is in the figures.
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
class Ask:
    """One request. more: fields of the body beside these, such as service_tier."""

    prompt: str
    max_tokens: int
    more: dict[str, Any]


@dataclass(frozen=True)
class Served:
    """What came of a request. started_s: on the loop's clock; first_s: until the first text; seconds: until the end."""

    started_s: float
    first_s: float
    seconds: float
    tokens: int


class Client:
    """An endpoint's completions."""

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

    async def send(self, ask: Ask) -> Served:
        """Raises RuntimeError where the endpoint does not answer with a stream of text."""
        body = {
            "model": self._model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **ask.more,
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
        return Served(started, first, time.monotonic() - started, usage or chunks)

    async def closed_loop(self, asks: Iterable[Ask], concurrency: int) -> list[Served]:
        """So many clients, each sending its next request when the last one is answered, until all are."""
        left = iter(asks)

        async def work() -> list[Served]:
            return [await self.send(ask) for ask in left]

        return [served for each in await asyncio.gather(*(work() for _ in range(concurrency))) for served in each]

    async def open_loop(self, asks: Iterable[Ask], per_s: float) -> list[Served]:
        """Requests arrive at random (Poisson), whether or not others are answered."""
        gaps = random.Random(0)
        async with asyncio.TaskGroup() as group:
            tasks = []
            for ask in asks:
                tasks.append(group.create_task(self.send(ask)))
                await asyncio.sleep(gaps.expovariate(per_s))
        return [task.result() for task in tasks]


def make_asks(number: int, round_id: int, more: dict[str, Any], shape: str = "mixed") -> Iterator[Ask]:
    """`mixed`: 16..128 prompt and 8..96 output tokens; `short`: 32 and 8. A letter is a token of bench_model's
    tokenizer; no two rounds share a prompt."""
    lengths, letters = random.Random(0), random.Random(1000 + round_id)
    for _ in range(number):
        prompt, output = (lengths.randint(16, 128), lengths.randint(8, 96)) if shape == "mixed" else (32, 8)
        yield Ask("".join(letters.choices(string.ascii_lowercase, k=prompt)), output, more)
