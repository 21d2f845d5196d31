"""Coordinator: runs the batches of a store, from the check of their file to their output files.

It keeps nothing: the store is the truth. Whatever dies, the next coordinator lists the batches that are not in a final
state and goes on with each where its record and its parts say.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from secrets import token_hex
from typing import Any

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Ledger
from moray.batch.output.lease import hold_lease
from moray.batch.status.status import Reporter
from moray.batch.status.workers import Workers
from moray.engine.errors import JobError, OutputError
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.export import write_output_files
from moray.jobs.batches.job import BatchJob
from moray.jobs.batches.lines import HashingReader, read_lines
from moray.jobs.batches.record import Batch, Status
from moray.jobs.batches.run import Answer, BatchRun
from moray.jobs.batches.store import INPUT, BatchStore
from moray.jobs.batches.sweep import sweep
from moray.jobs.batches.validate import Checked, Rules, check_lines
from moray.serve.args import EndpointArgs

logger = logging.getLogger("ray.serve")

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 5.0  # between two looks for new batches and for cancelled ones
REPORT_EVERY_S = 1.0
RETRY_S, MAX_RETRY_S = 10.0, 600.0  # before a batch that failed is tried again, at first and in the end
DRAIN_S = 600.0  # that requests in flight have when the batch expires or is cancelled
SWEEP_EVERY_S = 3600.0
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Settings:
    """Holds what a coordinator needs of the endpoint's arguments.

    Seconds of poll_s and below are shortened by tests.
    """

    model: str
    model_path: str
    max_requests: int
    max_line_bytes: int
    file_retention_s: float
    batch_retention_s: float
    poll_s: float
    retry_s: float = RETRY_S
    drain_s: float = DRAIN_S

    @classmethod
    def of(cls, args: EndpointArgs, store: BatchStore) -> "Settings":
        """Return the settings of an endpoint."""
        return cls(
            args.model_name,
            args.model,
            args.max_batch_requests,
            args.max_body_bytes,
            args.file_retention_days * DAY_S,
            args.batch_retention_days * DAY_S,
            LOCAL_POLL_S if store.folder.is_local else REMOTE_POLL_S,
        )


class Coordinator:
    """Runs all batches of a store.

    make_answer:  returns what answers the lines of a batch, by the batch's id
    budget:       how many lines are in flight, over all batches
    clock:        seconds since 1970
    """

    def __init__(
        self,
        store: BatchStore,
        settings: Settings,
        make_answer: Callable[[str], Answer],
        budget: RowBudget,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._make_answer = make_answer
        self._budget = budget
        self._clock = clock
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
        settings = self._settings
        try:
            await asyncio.to_thread(sweep, self._store, self._clock(), settings.batch_retention_s)
        except (OSError, OutputError, JobError, ValueError) as error:
            logger.warning("the store of batches cannot be swept: %s", error)

    async def _run_batch(self, batch: Batch) -> None:
        """Run a batch to its end. Where that fails, wait: the task ends, and the store says where to go on.

        The wait doubles as long as nothing more is committed: what fails for good must not keep the engines busy.
        """
        done = batch.completed + batch.failed
        try:
            await self._advance(batch)
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

    async def _advance(self, batch: Batch) -> None:
        if batch.status is Status.VALIDATING:
            batch = await self._validate(batch)
        if batch.status is Status.IN_PROGRESS:
            batch = await self._work(batch)
        if not batch.status.is_final:  # finalizing, cancelling, or in progress and expired
            batch = await asyncio.to_thread(self._export, batch)
        await asyncio.to_thread(self._store.close_batch, batch)

    async def _write(self, batch: Batch) -> Batch:
        await asyncio.to_thread(self._store.write_batch, batch)
        return batch

    @property
    def _now(self) -> int:
        return int(self._clock())

    # validating

    async def _validate(self, batch: Batch) -> Batch:
        if await asyncio.to_thread(self._store.cancel_requested_at, batch) is not None:
            return await self._write(batch.cancel(self._now))
        job, checked = await asyncio.to_thread(self._check, batch)
        if job is None:
            return await self._write(batch.reject(checked.errors, self._now))
        return await self._write(batch.start(job.plan.num_rows, self._settings.model, self._now))

    def _check(self, batch: Batch) -> tuple[BatchJob | None, Checked]:
        """Check the input of a batch, and plan it where it is right."""
        folder, digest = self._store.job(batch.id), sha256()
        settings = self._settings
        rules = Rules((batch.endpoint,), settings.model, settings.max_requests, settings.max_line_bytes)
        with folder.open(INPUT) as file:
            checked = check_lines(read_lines(HashingReader(file, digest), settings.max_line_bytes), rules)
        if checked.errors:
            return None, checked
        others = {"task": "batch", "batch": batch.id, "batch.endpoint": batch.endpoint, "model.name": settings.model}
        fingerprint = Fingerprint({INPUT: digest.hexdigest()}, others)
        job = BatchJob.of(folder, (folder, INPUT), checked, fingerprint, settings.max_line_bytes, self._origin(batch))
        job.write()
        return job, checked

    def _origin(self, batch: Batch) -> dict[str, Any]:
        return {"moray": version("moray"), "batch": batch.id, "model": self._settings.model_path}

    # in_progress

    def _job(self, batch: Batch) -> BatchJob:
        folder = self._store.job(batch.id)
        job = BatchJob.read(folder, (folder, INPUT), self._settings.max_line_bytes, self._origin(batch))
        if job is None:
            raise JobError(f"{folder.path} has lost its plan")
        return job

    async def _work(self, batch: Batch) -> Batch:
        """Run a batch until everything is committed, it expires, or its owner cancels it."""
        job = await asyncio.to_thread(self._job, batch)
        committed = await asyncio.to_thread(job.committed)
        rows = [shard.num_rows for shard in job.plan.shards]
        # A batch whose requests all fail is complete all the same.
        ledger = Ledger(rows, committed, max_failed_rows=job.plan.num_rows)
        run_name = f"{self._now}-{token_hex(2)}"
        reporter = Reporter(batch.id, run_name, ledger, job.folder, time.monotonic, Workers())
        run = BatchRun(job, ledger, self._make_answer(batch.id), self._budget, reporter)
        batch = await self._count(batch, ledger)
        reason = await self._stop_reason(batch)  # it may have come while there was no coordinator
        if reason is None:
            reason = await self._watch(batch, run, ledger, reporter)
        batch = await self._count(batch, ledger)
        if ledger.is_complete and reason != "cancelled":
            batch = await self._write(batch.finalize(self._now))
        elif reason == "cancelled":
            batch = await self._write(batch.cancel(self._now))
        await asyncio.to_thread(run.end, reason)
        return batch

    async def _watch(self, batch: Batch, run: BatchRun, ledger: Ledger, reporter: Reporter) -> str | None:
        """Return when a run is over, and why it was stopped; None where it was not."""
        running = asyncio.create_task(run.run())
        reason, stopped_s, reported_s = None, 0.0, time.monotonic()
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=self._settings.poll_s)
                if time.monotonic() - reported_s > REPORT_EVERY_S:
                    reported_s = time.monotonic()
                    await asyncio.to_thread(lambda: reporter.write(reporter.status()))
                batch = await self._count(batch, ledger)
                if reason is None and (reason := await self._stop_reason(batch)) is not None:
                    stopped_s = time.monotonic()
                    run.stop()
                elif reason is not None and time.monotonic() - stopped_s > self._settings.drain_s:
                    break
        finally:
            if not running.done():
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        if not running.cancelled():
            running.result()
        return reason

    async def _stop_reason(self, batch: Batch) -> str | None:
        try:
            if await asyncio.to_thread(self._store.cancel_requested_at, batch) is not None:
                return "cancelled"
        except (OSError, OutputError):
            return None
        return "expired" if self._clock() >= batch.expires_at else None

    async def _count(self, batch: Batch, ledger: Ledger) -> Batch:
        """Write the counts into the record, where they have changed."""
        counted = batch.count(ledger.ok, ledger.failed, ledger.prompt_tokens, ledger.generated_tokens)
        return batch if counted == batch else await self._write(counted)

    # finalizing, cancelling, expired

    def _export(self, batch: Batch) -> Batch:
        """Write the output files of a batch, and its record with their ids. Doing it again makes the same files."""
        if not batch.total:  # cancelled before its file was checked
            ended = batch.end(self._now, None, None)
            self._store.write_batch(ended)
            return ended
        now, kept_s = self._now, int(batch.output_expires_s or self._settings.file_retention_s)
        ids = write_output_files(self._store, batch, self._job(batch), now, now + kept_s)
        ended = batch.end(now, *ids)
        self._store.write_batch(ended)
        return ended
