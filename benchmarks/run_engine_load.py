"""Run the engine alone under the load that bench_serve.py puts on endpoints: without HTTP and Ray, in one process.

It reads lines of JSON, {"requests": [...], "concurrency": n}, and answers each with a line of results.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator

from http_load import LoadRequest, LoadResult

from moray.engine.async_engine import AsyncEngine
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.platform.cpus import available_cores
from moray.engine.request import Request


async def send(engine: AsyncEngine, request_id: int, request: LoadRequest) -> LoadResult:
    """Run a request as http_load.Client.send does. The prompt is tokenized; the answer is not decoded."""
    assert engine.tokenizer is not None
    started, first = time.monotonic(), 0.0
    ids = engine.tokenizer.encode_prompt(request.prompt)
    with engine.submit(
        [Request(str(request_id), ids, SamplingParams(max_tokens=request.max_tokens, ignore_eos=True))]
    ) as s:
        async for _ in s:
            first = first or time.monotonic() - started
    return LoadResult(started, first, time.monotonic() - started, request.max_tokens)


async def closed_loop(
    engine: AsyncEngine, requests: list[LoadRequest], concurrency: int, ids: Iterator[int]
) -> list[LoadResult]:
    left = iter(requests)

    async def work() -> list[LoadResult]:
        return [await send(engine, next(ids), request) for request in left]

    return [results for each in await asyncio.gather(*(work() for _ in range(concurrency))) for results in each]


async def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the figures
    ids = itertools.count()
    config = EngineConfig(max_num_seqs=int(sys.argv[2]), num_threads=available_cores())
    engine = await AsyncEngine.start(lambda: Engine(sys.argv[1], config))
    print("{}", file=channel, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        work = json.loads(line)
        results = await closed_loop(
            engine, [LoadRequest(**request) for request in work["requests"]], work["concurrency"], ids
        )
        print(json.dumps([vars(one) for one in results]), file=channel, flush=True)
    engine.close()


if __name__ == "__main__":
    asyncio.run(main())
