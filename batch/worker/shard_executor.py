"""ShardExecutor: runs the shards of a worker on one engine. It does not use Ray."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock
from typing import TYPE_CHECKING, Protocol

from moray.batch.ledger import Progress
from moray.batch.worker.admission_queue import AdmissionQueue, QueuedRow, none_cached
from moray.batch.worker.equal_rows import Answer, EqualRows, Turn
from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.batch.worker.quarantine import RowId
from moray.batch.worker.stats import WorkerStats
from moray.engine.core.limits import BLOCK_SIZE
from moray.engine.engine_loop import EngineLoop
from moray.engine.errors import RequestError
from moray.engine.request import Completion, Output
from moray.engine.structured.constraint import MAX_COMPILED

if TYPE_CHECKING:  # the driver imports this module too, and does not need torch
    from moray.engine.engine import Engine

EXPERTS_EVERY_S = 10.0  # seconds between two reads of the experts' token counts
QUEUE_FACTOR = 2  # queued samples per sample that runs at once, at most


class WriteJournal(Protocol):
    """Records which rows are in the engine; see Journal.write."""

    def __call__(self, rows: Collection[RowId], *, is_trial: bool) -> None: ...


@dataclass(slots=True)
class _RunningRow:
    """Holds the state of a row in the engine.

    num_samples:  how many samples it has
    started_s:    when it entered the engine, by the executor's clock
    samples:      sample's index -> completion, for the samples that have finished
    """

    shard: InFlightShard
    row: InFlightRow
    num_samples: int
    started_s: float
    samples: dict[int, Completion] = field(default_factory=dict)


class ShardExecutor:
    """Keeps an engine full with rows of the shards given to it.

    A row enters the engine when there is room for it, so its time limit does not include the time in the queue. An
    exception in the engine fails every shard, including those that wait and those to come. Suspects go first, one group
    at a time and nothing else with it, the smallest group first: so a bad row is found before it ends more workers.
    A row that must have the answer of an equal one does not enter the engine: it gets a copy.

    make_engine:         builds the engine, in the engine's thread; what it raises is raised here
    journal:             called with the rows in the engine, before they enter it
    on_suspect_cleared:  called with (shard, index) of each suspect that the engine survived
    on_failure:          called with an exception in the engine, before the shards fail; it may end the process
    dedup:               whether rows get copies of the answers of equal rows
    clock:               seconds, monotonic
    """

    def __init__(
        self,
        make_engine: "Callable[[], Engine]",
        journal: WriteJournal,
        on_suspect_cleared: Callable[[int, int], None],
        row_timeout_s: float | None = None,
        on_failure: Callable[[BaseException], None] = lambda failure: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        dedup: bool = True,
    ) -> None:
        self._journal = journal
        self._equal_rows = EqualRows() if dedup else None
        self._on_suspect_cleared = on_suspect_cleared
        self._on_failure = on_failure
        self._row_timeout_s = row_timeout_s
        self._clock = clock
        self._suspects: dict[int, list[tuple[InFlightShard, InFlightRow]]] = {}  # by group, the suspects that wait
        self._trial: list[tuple[InFlightShard, InFlightRow]] = []  # the group that is in the engine
        self._running: OrderedDict[str, _RunningRow] = OrderedDict()  # by request id, oldest first
        self._num_seqs = 0  # of the rows in the engine
        self._num_waiting_seqs = 0  # of the rows that wait outside the engine; guarded by the lock
        self._num_requests = 0
        self._expert_tokens: list[list[int]] | None = None
        self._experts_at_s = clock()
        self._lock = Lock()
        self._has_room = Condition(self._lock)
        # by id(), the shards that are not done; guarded by the lock, as is _failure
        self._shards: dict[int, InFlightShard] = {}
        self._failure: BaseException | None = None
        self._loop = EngineLoop(
            make_engine,
            before_step=self._admit_rows,
            after_step=self._finish_step,
            on_failure=self._report_failure,
            clock=clock,
        )
        self._loop.start().result()
        self.engine = self._loop.engine
        self._max_waiting_seqs = QUEUE_FACTOR * self.engine.limits.max_num_seqs  # in samples; see wait_for_room
        self._waiting = AdmissionQueue(self._max_waiting_seqs)
        self._attributed_s = self.engine.metrics.busy_s  # how much of busy_s has been attributed to shards

    def wait_for_room(self) -> None:
        """Wait until few rows are queued, or the engine has failed.

        So no more shards are started than necessary, and shards of which only a long row is left hold up no other
        shard.
        """
        with self._has_room:
            self._has_room.wait_for(
                lambda: self._failure is not None or self._num_waiting_seqs < self._max_waiting_seqs
            )

    def start(self, shard: InFlightShard) -> None:
        """Queue a shard's rows; InFlightShard.wait() waits for their end.

        What completions must obey is compiled here, in the caller's thread: the engine's has other rows to run.
        """
        different = {row.request.params.structured for row in shard.rows}
        for structured in different if len(different) <= MAX_COMPILED else ():  # else only the last ones are kept
            with suppress(RequestError):  # the engine will refuse those rows, one by one
                if structured is not None:
                    self.engine.compile(structured)
        with self._lock:
            if self._failure is None:
                self._shards[id(shard)] = shard
                self._num_waiting_seqs += sum(row.request.num_samples for row in shard.rows)
                self._loop.run_between_steps(partial(self._queue_shard, shard))
            else:
                shard.failure = self._failure
                shard.done.set()

    def progress(self) -> list[Progress]:
        """Return the progress of every shard that is not done."""
        with self._lock:
            return [shard.progress for shard in self._shards.values()]

    def stats(self) -> WorkerStats:
        """Return the worker's statistics as they are now; may be called while a step runs."""
        stats = self.engine.stats()
        return WorkerStats(
            at_s=self._clock(),
            rows=len(self._running),
            seqs=self._num_seqs + self._num_waiting_seqs,
            waiting_seqs=stats.waiting_seqs + self._num_waiting_seqs,
            free_blocks=stats.free_blocks,
            blocks=stats.blocks,
            max_num_seqs=stats.max_num_seqs,
            max_num_batched_tokens=stats.max_num_batched_tokens,
            totals=stats.totals,
        )

    def pop_expert_tokens(self) -> list[list[int]] | None:
        """Return Engine.expert_tokens() as last read; None where that was returned before.

        They are read every EXPERTS_EVERY_S, and when a shard is done and no other one is in flight.
        """
        with self._lock:
            tokens, self._expert_tokens = self._expert_tokens, None
        return tokens

    @property
    def stalled_s(self) -> float:
        """Return the seconds since the engine last came back from a step; 0 while it has nothing to do."""
        return self._loop.stalled_s

    def fail(self, failure: BaseException) -> None:
        """Fail every shard, including those to come, and end the engine's thread."""
        with self._lock:
            self._failure = self._failure or failure
            for shard in self._shards.values():
                shard.failure = self._failure
                shard.done.set()
            self._shards.clear()
            self._has_room.notify_all()
        self._loop.close()

    def join(self, timeout_s: float) -> None:
        """Wait until the engine's thread has ended; fail() comes first."""
        self._loop.join(timeout_s)

    # The engine's thread calls the methods below.

    def _report_failure(self, failure: BaseException) -> None:
        self._on_failure(failure)
        self.fail(failure)

    def _update_expert_tokens(self) -> None:
        """Read the engine's token counts of the experts.

        This runs in the engine's thread: a read from another one would break a CUDA graph that is being captured.
        """
        self._experts_at_s = self._clock()
        tokens = self.engine.expert_tokens().tolist()
        with self._lock:
            self._expert_tokens = tokens

    def _queue_shard(self, shard: InFlightShard) -> None:
        self._finish_shard_if_done(shard)  # a shard without rows is done at once
        for row in shard.rows:
            self._queue(shard, row)

    def _queue(self, shard: InFlightShard, row: InFlightRow) -> None:
        suspect = shard.suspects.get(row.index)
        if suspect is None:
            if self._copies(shard, row):
                return
            is_short = len(row.request.prompt_token_ids) <= BLOCK_SIZE
            num_cached = none_cached if is_short else self.engine.cached_prefix(row.request)
            self._waiting.add(QueuedRow(shard, row, num_cached))
        elif suspect.is_poison:
            self._subtract_waiting([row])
            self._complete_row(shard, row, [_failed(row, suspect.worker_exit.code, suspect.message)])
        else:
            self._suspects.setdefault(suspect.group, []).append((shard, row))

    def _copies(self, shard: InFlightShard, row: InFlightRow) -> bool:
        """Return whether the row gets the answer of an equal row, now or when that one is done."""
        if self._equal_rows is None:
            return False
        found = self._equal_rows.add(shard, row)
        if found is Turn.THIS:
            return False
        self._subtract_waiting([row])
        if isinstance(found, Answer):
            self._copy(shard, row, found)
        return True

    def _copy(self, shard: InFlightShard, row: InFlightRow, answer: Answer) -> None:
        """Complete a row with the answer of an equal one."""
        shard.latencies_s[row.index] = answer.latency_s
        shard.prompt_tokens += row.request.num_input_tokens
        shard.generated_tokens += sum(len(done.token_ids) for done in answer.completions)
        shard.num_copied += 1
        self._complete_row(shard, row, answer.completions)

    def _copy_to_equal_rows(self, shard: InFlightShard, row: InFlightRow, completions: list[Completion]) -> None:
        """Give the answer of a row to those that wait for it; if it has an error, the first of them is computed."""
        if self._equal_rows is None:
            return
        answer = Answer(completions, shard.latencies_s.get(row.index, 0.0))
        waiting = self._equal_rows.finish(shard, row, answer)
        has_failed = any(done.error is not None for done in completions)
        for other_shard, other in waiting:
            if has_failed:
                with self._lock:
                    self._num_waiting_seqs += other.request.num_samples
                self._queue(other_shard, other)
            else:
                self._copy(other_shard, other, answer)

    def _subtract_waiting(self, rows: Iterable[InFlightRow]) -> None:
        with self._has_room:
            self._num_waiting_seqs -= sum(row.request.num_samples for row in rows)
            self._has_room.notify_all()

    def _admit_rows(self) -> None:
        """Add the rows that come next to the engine, and more of them where it refuses all."""
        while chosen := self._choose_rows():
            self._add(chosen)
            if self._running:
                return
        if not self._running:
            self._journal([], is_trial=False)

    def _add(self, chosen: Sequence[tuple[InFlightShard, InFlightRow]]) -> None:
        running = [(running.shard.index, running.row.index) for running in self._running.values()]
        self._journal([*running, *((shard.index, row.index) for shard, row in chosen)], is_trial=bool(self._trial))
        self._subtract_waiting(row for _, row in chosen)
        for shard, row in chosen:
            request_id = str(self._num_requests)
            self._num_requests += 1
            request = row.request._replace(request_id=request_id)
            try:
                self.engine.add(request)
            except RequestError as error:
                self._complete_row(shard, row, [_failed(row, error.code, error.message)])
                continue
            shard.prompt_tokens += request.num_input_tokens
            self._running[request_id] = _RunningRow(shard, row, request.num_samples, self._clock())
            self._num_seqs += request.num_samples
        self._end_trial()  # the engine may have refused all rows of the trial

    def _choose_rows(self) -> list[tuple[InFlightShard, InFlightRow]]:
        """Return the rows that enter the engine now."""
        if self._trial:
            return []
        if self._suspects:
            if not self._running:
                group = min(self._suspects, key=lambda number: len(self._suspects[number]))
                self._trial = self._suspects.pop(group)
            return self._trial
        free_seqs = self.engine.limits.max_num_seqs - self._num_seqs
        return [(queued.shard, queued.row) for queued in self._waiting.pop(free_seqs)]

    def _finish_step(self, outputs: Sequence[Output]) -> None:
        self._attribute_time(outputs)
        for output in outputs:
            running = self._running[output.request_id]
            running.shard.generated_tokens += len(output.new_token_ids)
            if output.completion is None:
                continue
            running.samples[output.sample] = output.completion
            if len(running.samples) == running.num_samples:
                self._release_row(output.request_id, [running.samples[i] for i in range(running.num_samples)])
        if self._clock() - self._experts_at_s > EXPERTS_EVERY_S:
            self._update_expert_tokens()
        self._expire_rows()

    def _attribute_time(self, outputs: Sequence[Output]) -> None:
        """Divide the time since the last step that had outputs equally between the shards of these outputs."""
        if outputs:
            busy_s = self.engine.metrics.busy_s
            each_s, self._attributed_s = (busy_s - self._attributed_s) / len(outputs), busy_s
            for output in outputs:
                self._running[output.request_id].shard.engine_s += each_s

    def _expire_rows(self) -> None:
        limit_s = self._row_timeout_s
        while limit_s is not None and self._running:
            request_id, oldest = next(iter(self._running.items()))
            seconds = self._clock() - oldest.started_s
            if seconds <= limit_s:
                return
            self.engine.abort(request_id)
            message = f"not done after {seconds:.1f} s; row_timeout_s is {limit_s:g}. Raise it or lower max_tokens."
            self._release_row(request_id, [_failed(oldest.row, "row_timeout", message)])

    def _release_row(self, request_id: str, completions: list[Completion]) -> None:
        running = self._running.pop(request_id)
        self._num_seqs -= running.num_samples
        running.shard.latencies_s[running.row.index] = self._clock() - running.started_s
        self._end_trial()
        self._complete_row(running.shard, running.row, completions)

    def _end_trial(self) -> None:
        """Clear the suspects that were tried, once the last of them has left the engine."""
        if self._trial and not self._running:
            self._journal([], is_trial=False)  # so that these rows are not blamed if the process dies of something else
            trial, self._trial = self._trial, []
            for shard, row in trial:
                self._on_suspect_cleared(shard.index, row.index)

    def _complete_row(self, shard: InFlightShard, row: InFlightRow, completions: list[Completion]) -> None:
        shard.completions[row.index] = completions
        self._copy_to_equal_rows(shard, row, completions)
        self._finish_shard_if_done(shard)

    def _finish_shard_if_done(self, shard: InFlightShard) -> None:
        if len(shard.completions) == len(shard.rows):
            with self._lock:
                self._shards.pop(id(shard), None)
                is_last = not self._shards
            if is_last:
                self._update_expert_tokens()
            shard.done.set()


def _failed(row: InFlightRow, code: str, message: str) -> Completion:
    return Completion((), "error", len(row.request.prompt_token_ids), error=(code, message))
