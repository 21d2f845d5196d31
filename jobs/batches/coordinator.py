"""Coordinator: runs the batches of a store.

It keeps nothing: the store is the truth. Whatever dies, the next coordinator lists the batches that are not in a final
state and goes on with each where its record and its parts say.
"""

import asyncio
import logging
import socket
import time
from contextlib import ExitStack
from secrets import token_hex

from moray.batch.output.lease import hold_lease
from moray.engine.errors import JobError, OutputError
from moray.jobs.batches.lifecycle import Lifecycle
from moray.jobs.batches.record import BatchRecord
from moray.jobs.batches.sweep import sweep

logger = logging.getLogger("ray.serve")

MAX_RETRY_S = 600.0  # before a batch that has failed often is tried again
SWEEP_EVERY_S = 3600.0


class Coordinator:
    """Runs all batches of a store.

    lifecycle:  takes each batch to its end; its store is the one
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._store, self._settings = lifecycle.store, lifecycle.settings
        self._name = f"{socket.gethostname()}-{token_hex(4)}"
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the id of a batch
        # by the id of a batch: requests that were done when it last failed, and how often it did with so many
        self._failures: dict[str, tuple[int, int]] = {}

    async def run(self) -> None:
        """Run until it is cancelled. While another coordinator lives, wait for its end."""
        with ExitStack() as held:
            await self._take_lease(held)
            swept_s = -SWEEP_EVERY_S
            try:
                while True:
                    await self._start_new()
                    if time.monotonic() - swept_s > SWEEP_EVERY_S:
                        swept_s = time.monotonic()
                        await self._sweep()
                    await asyncio.sleep(self._settings.poll_s)
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _take_lease(self, held: ExitStack) -> None:
        while True:
            lease = hold_lease(self._store.folder, self._name, logger.info)
            try:
                await asyncio.to_thread(held.enter_context, lease)
                return
            except (OutputError, JobError) as error:
                logger.info("%s", error)
                await asyncio.sleep(self._settings.poll_s)

    async def _start_new(self) -> None:
        """Start a task for each open batch that has none."""
        try:
            batches = await asyncio.to_thread(self._store.open_batches)
        except (OSError, OutputError, JobError, ValueError) as error:
            logger.warning("the store of batches cannot be read: %s", error)
            return
        for batch in batches:
            if batch.id not in self._tasks:
                task = asyncio.create_task(self._run_batch(batch), name=batch.id)
                self._tasks[batch.id] = task
                task.add_done_callback(lambda ended: self._tasks.pop(ended.get_name()))

    async def _sweep(self) -> None:
        try:
            await asyncio.to_thread(sweep, self._store, self._lifecycle.clock(), self._settings.batch_retention_s)
        except (OSError, OutputError, JobError, ValueError) as error:
            logger.warning("the store of batches cannot be swept: %s", error)

    async def _run_batch(self, batch: BatchRecord) -> None:
        """Run a batch to its end. Where that fails, wait: the task ends, and the store says where to go on.

        The wait doubles as long as nothing more is committed: what fails for good must not keep the engines busy.
        """
        done = batch.completed + batch.failed
        try:
            await self._lifecycle.advance(batch)
            self._failures.pop(batch.id, None)
            return
        except (OSError, OutputError, JobError) as error:
            logger.warning("%s failed and is tried again: %s", batch.id, error)
        except Exception:
            logger.exception("%s failed and is tried again", batch.id)
        before, number = self._failures.get(batch.id, (-1, 0))
        number = number + 1 if done == before else 1
        self._failures[batch.id] = done, number
        await asyncio.sleep(min(MAX_RETRY_S, self._settings.retry_s * 2 ** (number - 1)))
