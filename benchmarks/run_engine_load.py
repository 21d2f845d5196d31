"""The engine alone, under the load that bench_serve.py puts on endpoints: no HTTP, no Ray, its own process.

Reads a JSON line {"asks": [...], "concurrency": n} at a time and answers with a line of the figures.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator

from http_load import Ask, Served

from moray.engine.async_engine import AsyncEngine
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.platform.cpus import available_cores
from moray.engine.request import Request


async def send(engine: AsyncEngine, request_id: int, ask: Ask) -> Served:
    """Send as http_load.Client.send does; text is made of the prompt's tokens, none of the answer's."""
    assert engine.tokenizer is not None
    started, first = time.monotonic(), 0.0
    ids = engine.tokenizer.encode_prompt(ask.prompt)
    with engine.submit(
        [Request(str(request_id), ids, SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True))]
    ) as s:
        async for _ in s:
            first = first or time.monotonic() - started
    return Served(started, first, time.monotonic() - started, ask.max_tokens)


async def closed_loop(engine: AsyncEngine, asks: list[Ask], concurrency: int, ids: Iterator[int]) -> list[Served]:
    left = iter(asks)

    async def work() -> list[Served]:
        return [await send(engine, next(ids), ask) for ask in left]

    return [served for each in await asyncio.gather(*(work() for _ in range(concurrency))) for served in each]


async def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the figures
    ids = itertools.count()
    config = EngineConfig(max_num_seqs=int(sys.argv[2]), num_threads=available_cores())
    engine = await AsyncEngine.start(lambda: Engine(sys.argv[1], config))
    print("{}", file=channel, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        work = json.loads(line)
        served = await closed_loop(engine, [Ask(**ask) for ask in work["asks"]], work["concurrency"], ids)
        print(json.dumps([vars(one) for one in served]), file=channel, flush=True)
    engine.close()


if __name__ == "__main__":
    asyncio.run(main())
