"""An endpoint of the tiny model in this process: real HTTP by uvicorn, without Serve around it.

With batch_store it runs batches too, and its coordinator is beside it in the same event loop.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from made_jobs import TINY
from patience import PATIENCE_S

from moray.engine.async_engine import AsyncEngine
from moray.engine.engine import Engine
from moray.jobs.batches.answers import START_ROWS, Replicas
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.coordinator import Coordinator
from moray.jobs.batches.lifecycle import Lifecycle
from moray.jobs.batches.service import open_service
from moray.jobs.batches.settings import Settings
from moray.jobs.batches.store import BatchStore
from moray.serve.api import create_app
from moray.serve.args import EndpointArgs
from moray.serve.endpoint import Endpoint
from moray.serve.keys import Keys
from moray.serve.openai.line_answers import LineAnswerer


class Served:
    """An endpoint in a thread.

    url:     where it listens
    engine:  the engine that it steps
    """

    url: str
    endpoint: Endpoint
    engine: Engine
    loop: asyncio.AbstractEventLoop

    def __init__(self, **args: Any) -> None:
        self._args = EndpointArgs.model_validate({"model": str(TINY), "dtype": "float32", "num_threads": 1} | args)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="served", daemon=True)

    def start(self) -> "Served":
        self._thread.start()
        assert self._started.wait(PATIENCE_S), "the endpoint did not start"
        if self._failure is not None:
            raise self._failure
        return self

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as failure:
            self._failure = failure
        finally:
            self._started.set()

    async def _serve(self) -> None:
        keys = Keys(self._args.keys_file)
        config = self._args.engine_config(num_threads=1)

        def make_engine() -> Engine:
            self.engine = Engine(self._args.model, config)
            return self.engine

        engine = await AsyncEngine.start(make_engine)
        self.loop = asyncio.get_running_loop()
        self.endpoint = Endpoint(self._args, engine)
        service, coordinating = None, None
        if self._args.batch_store is not None:
            service = open_service(self._args)
            coordinating = asyncio.create_task(self._coordinate(self._args.batch_store))
        app = create_app(self.endpoint, keys, service)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self._started.set()
        try:
            await serving
        finally:
            if coordinating is not None:
                coordinating.cancel()
                await asyncio.gather(coordinating, return_exceptions=True)
            engine.close()

    async def _coordinate(self, path: str) -> None:
        store, budget = BatchStore(path), RowBudget(START_ROWS)
        store.prepare()
        replicas = Replicas(LineAnswerer(self.endpoint).answer, budget)
        settings = replace(Settings.of(self._args, store), poll_s=0.05)
        await Coordinator(Lifecycle(store, settings, replicas.answer_for, budget)).run()


@contextmanager
def served(**args: Any) -> Iterator[Served]:
    endpoint = Served(**args).start()
    try:
        yield endpoint
    finally:
        endpoint.stop()
