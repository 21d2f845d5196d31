"""Batches: the deployment beside the endpoint's replicas that runs the coordinator, in a process without a model."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from moray.jobs.batches.answers import START_ROWS, Replicas
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.coordinator import Coordinator
from moray.jobs.batches.lifecycle import Lifecycle
from moray.jobs.batches.settings import Settings
from moray.jobs.batches.store import BatchStore
from moray.serve.app import NAME
from moray.serve.args import EndpointArgs
from moray.serve.batches import Answered, ReplicaClosingError, ReplicaFailedError
from moray.serve.openai.line_answers import LineRequest

RETRY_S = 1.0  # before lines are sent again that a replica which is being stopped did not answer

serve: Any = ray_serve


class Batches:
    """Runs the batches of the store. Serve starts it again when it dies; it goes on where the store says."""

    async def __init__(self, args: EndpointArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        assert args.batch_store is not None
        store, budget = BatchStore(args.batch_store), RowBudget(START_ROWS)
        await asyncio.to_thread(store.prepare)
        replicas = Replicas(_ask(serve.get_replica_context().app_name), budget)
        lifecycle = Lifecycle(store, Settings.of(args, store), replicas.answer_for, budget)
        self._running = asyncio.create_task(Coordinator(lifecycle).run())

    def check_health(self) -> None:
        """Raise what the coordinator ended with: Serve then replaces it."""
        if self._running.done():
            self._running.result()
            raise RuntimeError("the coordinator of batches has ended")

    async def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)


def _ask(application: str) -> Any:
    """Return what sends lines to a replica that Serve chooses."""

    async def ask(lines: Sequence[LineRequest]) -> Answered:
        while True:
            response = None
            try:
                # By its name: replicas and this deployment need each other, and Serve binds in one direction only.
                handle = serve.get_deployment_handle(NAME, application)
                response = handle.answer_lines.remote(list(lines))
                answered: Answered = await response
                return answered
            except asyncio.CancelledError:
                if response is not None:
                    response.cancel()
                raise
            except RayActorError:
                raise ReplicaFailedError from None
            except (ReplicaClosingError, RayServeException, RequestCancelledError):
                await asyncio.sleep(RETRY_S)

    return ask
