"""BatchRun: answers the requests of a batch that have no part yet, shard by shard. It needs neither HTTP nor Ray."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from moray.batch.ledger import Committed, Ended, Ledger
from moray.batch.run_events import RunEnded, RunStarted, ShardCommitted
from moray.batch.shards import Shard
from moray.batch.status.status import Reporter
from moray.batch.worker.quarantine import Quarantine, RowsInFlight
from moray.engine.errors import JobError
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.job import BatchJob, RequestLine
from moray.serve.batches import LineAnswer

MAX_SHARD_DEATHS = 2  # of replicas that had a shard, before its lines are tried apart from others
UNFIT_PAUSE_S = 30.0  # after replicas died whatever line they had

Answer = Callable[[Sequence[RequestLine]], Awaitable[Sequence[LineAnswer]]]


class WorkerDied(Exception):
    """Means that the process that answered some lines died, perhaps of one of them."""


class BatchRun:
    """Runs the shards of a batch that are not committed. What is committed is not run again.

    answer:    answers lines, in their order. Raises WorkerDied
    budget:    admits shards
    reporter:  writes status.json and the events
    """

    def __init__(self, job: BatchJob, ledger: Ledger, answer: Answer, budget: RowBudget, reporter: Reporter) -> None:
        self._job = job
        self._ledger = ledger
        self._answer = answer
        self._budget = budget
        self._reporter = reporter
        self._admitting: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def run(self) -> None:
        """Return when all shards are committed or, after stop(), those that were in flight.

        Raises JobError where a part cannot be written or the input cannot be read.
        """
        self._reporter.record(RunStarted(self._ledger.num_rows, self._ledger.pending))
        try:
            async with asyncio.TaskGroup() as group:
                self._admitting = group.create_task(self._admit(group))
                if self._is_stopping:
                    self._admitting.cancel()
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__

    def stop(self) -> None:
        """Start no more shards."""
        self._is_stopping = True
        if self._admitting is not None:
            self._admitting.cancel()

    def end(self, reason: str | None = None) -> None:
        """Write the last status. reason: why not everything was run; None where it was."""
        self._ledger.handle(Ended(reason))
        self._reporter.end()
        status = self._reporter.status()
        self._reporter.record(RunEnded(status.state, status.reason, status.pending_rows))
        self._reporter.write(status, at_once=True)

    async def _admit(self, group: asyncio.TaskGroup) -> None:
        for index in self._ledger.pending_shards:
            shard = self._job.plan.shards[index]
            release = await self._budget.acquire(shard.num_rows)
            task = group.create_task(self._run_shard(shard, release))
            task.add_done_callback(partial(_call, release))  # also where it was cancelled before it began

    async def _run_shard(self, shard: Shard, release: Callable[[], None]) -> None:
        """Answer and commit one shard, which the budget has admitted.

        release: gives its lines back to the budget
        """
        answers: Sequence[LineAnswer] | None = None
        requests = await asyncio.to_thread(self._job.requests, shard)
        for _ in range(MAX_SHARD_DEATHS):
            answers = await self._try(requests)
            if answers is not None:
                break
        release()
        if answers is None:
            answers = await self._answer_suspects(requests)
        counts = await asyncio.to_thread(self._job.commit, shard, requests, answers)
        self._ledger.handle(Committed(shard.index, counts))
        self._reporter.record(ShardCommitted(shard.index, counts.ok, counts.failed))

    async def _try(self, requests: Sequence[RequestLine]) -> Sequence[LineAnswer] | None:
        """Return the answers; None where the worker died."""
        try:
            return await self._answer(requests)
        except WorkerDied:
            return None

    async def _answer_suspects(self, requests: Sequence[RequestLine]) -> list[LineAnswer]:
        """Answer lines of which one may end its worker, by halves and with no other line in flight."""
        done: dict[int, LineAnswer] = {}
        quarantine = Quarantine()
        quarantine.record_crash(RowsInFlight([(0, row) for row in range(len(requests))], is_trial=False))
        while len(done) < len(requests):
            suspects = {row: suspect for row, suspect in quarantine.suspects(0).items() if row not in done}
            done |= {row: _killed(suspect.message) for row, suspect in suspects.items() if suspect.is_poison}
            left = {row: suspect.group for row, suspect in suspects.items() if row not in done}
            if not left:
                continue
            group = min(left.values())
            rows = [row for row, owner in left.items() if owner == group]
            async with self._budget.alone():
                answers = await self._try([requests[row] for row in rows])
            if answers is not None:
                done |= dict(zip(rows, answers, strict=True))
                for row in rows:
                    quarantine.clear((0, row))
                continue
            try:
                quarantine.record_crash(RowsInFlight([(0, row) for row in rows], is_trial=True))
            except JobError:  # whatever line they have: it is the workers, which may be better later
                await asyncio.sleep(UNFIT_PAUSE_S)
                quarantine = Quarantine()
                undone = [(0, row) for row in range(len(requests)) if row not in done]
                quarantine.record_crash(RowsInFlight(undone, is_trial=False))
        return [done[row] for row in range(len(requests))]


def _call(release: Callable[[], None], _: object) -> None:
    release()


def _killed(message: str) -> LineAnswer:
    error: dict[str, Any] = {"message": message, "type": "server_error", "param": None, "code": "killed_worker"}
    return LineAnswer(500, "", json.dumps({"error": error}), None, None, 0.0)
