"""Lifecycle: takes a batch from one state to the next, from the check of its file to its output files."""

import asyncio
import time
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from secrets import token_hex
from typing import Any

from moray.batch.fingerprint import Fingerprint
from moray.batch.ledger import Ledger
from moray.batch.status.status import Reporter
from moray.batch.status.workers import Workers
from moray.engine.errors import JobError, OutputError
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.export import write_output_files
from moray.jobs.batches.job import BatchJob
from moray.jobs.batches.lines import HashingReader, read_lines
from moray.jobs.batches.record import BatchRecord, BatchStatus
from moray.jobs.batches.run import Answer, BatchRun
from moray.jobs.batches.settings import Settings
from moray.jobs.batches.store import INPUT, BatchStore
from moray.jobs.batches.validate import Checked, Rules, check_lines

REPORT_EVERY_S = 1.0


class Lifecycle:
    """Runs batches of a store, each from the state in which its record is. Each state is written before it is left.

    store:        the batches, and where their states are written
    settings:     what a coordinator needs of the endpoint's arguments
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
        self.store = store
        self.settings = settings
        self.clock = clock
        self._make_answer = make_answer
        self._budget = budget

    async def advance(self, batch: BatchRecord) -> None:
        """Take a batch from the state of its record to its end. Raises OSError, OutputError and JobError."""
        if batch.status is BatchStatus.VALIDATING:
            batch = await self._validate(batch)
        if batch.status is BatchStatus.IN_PROGRESS:
            batch = await self._work(batch)
        if not batch.status.is_final:  # finalizing, cancelling, or in progress and expired
            batch = await asyncio.to_thread(self._export, batch)
        await asyncio.to_thread(self.store.close_batch, batch)

    async def _write(self, batch: BatchRecord) -> BatchRecord:
        await asyncio.to_thread(self.store.write_batch, batch)
        return batch

    @property
    def _now(self) -> int:
        return int(self.clock())

    # validating

    async def _validate(self, batch: BatchRecord) -> BatchRecord:
        if await asyncio.to_thread(self.store.cancel_requested_at, batch) is not None:
            return await self._write(batch.cancel(self._now))
        job, checked = await asyncio.to_thread(self._check, batch)
        if job is None:
            return await self._write(batch.reject(checked.errors, self._now))
        return await self._write(batch.start(job.plan.num_rows, self.settings.model, self._now))

    def _check(self, batch: BatchRecord) -> tuple[BatchJob | None, Checked]:
        """Check the input of a batch, and plan it where it is right."""
        folder, digest = self.store.job(batch.id), sha256()
        settings = self.settings
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

    def _origin(self, batch: BatchRecord) -> dict[str, Any]:
        return {"moray": version("moray"), "batch": batch.id, "model": self.settings.model_path}

    # in_progress

    def _job(self, batch: BatchRecord) -> BatchJob:
        folder = self.store.job(batch.id)
        job = BatchJob.read(folder, (folder, INPUT), self.settings.max_line_bytes, self._origin(batch))
        if job is None:
            raise JobError(f"{folder.path} has lost its plan")
        return job

    async def _work(self, batch: BatchRecord) -> BatchRecord:
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

    async def _watch(self, batch: BatchRecord, run: BatchRun, ledger: Ledger, reporter: Reporter) -> str | None:
        """Return when a run is over, and why it was stopped; None where it was not."""
        running = asyncio.create_task(run.run())
        reason, stopped_s, reported_s = None, 0.0, time.monotonic()
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=self.settings.poll_s)
                if time.monotonic() - reported_s > REPORT_EVERY_S:
                    reported_s = time.monotonic()
                    await asyncio.to_thread(lambda: reporter.write(reporter.status()))
                batch = await self._count(batch, ledger)
                if reason is None and (reason := await self._stop_reason(batch)) is not None:
                    stopped_s = time.monotonic()
                    run.stop()
                elif reason is not None and time.monotonic() - stopped_s > self.settings.drain_s:
                    break
        finally:
            if not running.done():
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        if not running.cancelled():
            running.result()
        return reason

    async def _stop_reason(self, batch: BatchRecord) -> str | None:
        try:
            if await asyncio.to_thread(self.store.cancel_requested_at, batch) is not None:
                return "cancelled"
        except (OSError, OutputError):
            return None
        return "expired" if self.clock() >= batch.expires_at else None

    async def _count(self, batch: BatchRecord, ledger: Ledger) -> BatchRecord:
        """Write the counts into the record, where they have changed."""
        counted = batch.count(ledger.ok, ledger.failed, ledger.prompt_tokens, ledger.generated_tokens)
        return batch if counted == batch else await self._write(counted)

    # finalizing, cancelling, expired

    def _export(self, batch: BatchRecord) -> BatchRecord:
        """Write the output files of a batch, and its record with their ids. Doing it again makes the same files."""
        if not batch.total:  # cancelled before its file was checked
            ended = batch.end(self._now, None, None)
            self.store.write_batch(ended)
            return ended
        now, kept_s = self._now, int(batch.output_expires_s or self.settings.file_retention_s)
        ids = write_output_files(self.store, batch, self._job(batch), now, now + kept_s)
        ended = batch.end(now, *ids)
        self.store.write_batch(ended)
        return ended
