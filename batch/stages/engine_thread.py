"""EngineThread: one thread steps the engine; the worker's calls hand it shards. No Ray here."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Condition, Event, Lock, Thread
from typing import TYPE_CHECKING, Protocol

from batch.faults.quarantine import RowId
from batch.ledger import Progress
from batch.stages.shard_run import Row, ShardRun
from batch.stages.waiting import Waiter, Waiting, none_cached
from batch.watch.figures import Figures
from engine.errors import RequestError
from engine.limits import BLOCK_SIZE
from engine.request import Completion, Output

if TYPE_CHECKING:  # the driver reads this module too, and has no use for torch
    from engine.engine import Engine

EXPERTS_EVERY_S = 10.0
AHEAD = 2  # times what runs at once may wait


class WriteJournal(Protocol):
    def __call__(self, rows: Collection[RowId], *, is_alone: bool) -> None: ...


@dataclass(slots=True)
class _Running:
    """A row in the engine; `samples` are those that are finished."""

    run: ShardRun
    row: Row
    num_samples: int
    started_s: float
    samples: dict[int, Completion] = field(default_factory=dict)


class EngineThread:
    """Keeps the engine full with rows of the shards given to it.

    A row enters the engine when there is a place for it, so its time limit does not count the waiting. An exception in
    the engine fails every shard, those that wait and those to come. Suspects go first, each alone in the engine.

    journal:   told which rows are in the engine before they are
    survived:  told of each suspect (shard, index) that did
    broke:     told of an exception in the engine, before the shards are; it may end the process

    make_engine is called in the thread, and what it raises is raised here: where two threads have run torch, OpenMP
    counts the threads of both, finds them too many for the cores and stops spinning, which costs a sixth of the speed.
    """

    engine: "Engine"
    _waiting: Waiting
    _reach: int  # samples: see wait_for_room

    def __init__(
        self,
        make_engine: "Callable[[], Engine]",
        journal: "WriteJournal",
        survived: Callable[[int, int], None],
        row_timeout_s: float | None = None,
        broke: Callable[[BaseException], None] = lambda failure: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._survived = survived
        self._broke = broke
        self._row_timeout_s = row_timeout_s
        self._clock = clock
        self._arrivals: SimpleQueue[ShardRun | None] = SimpleQueue()
        self._suspects: deque[tuple[ShardRun, Row]] = deque()
        self._is_alone = False  # a suspect is in the engine
        self._running: OrderedDict[str, _Running] = OrderedDict()  # by request id, oldest first
        self._num_seqs = 0  # samples of the rows in the engine
        self._num_waiting_seqs = 0  # of those that wait outside of it; guarded by the lock
        self._stepping: tuple[float, float] | None = None  # start of the step that runs, busy_s before it
        self._num_requests = 0
        self._unshared_s = 0.0
        self._expert_tokens: list[list[int]] | None = None
        self._experts_at_s = clock()
        self._busy_since_s: float | None = None
        self._lock = Lock()
        self._room = Condition(self._lock)
        self._runs: dict[int, ShardRun] = {}  # by id(), those not done; guarded by the lock, as is _failure
        self._failure: BaseException | None = None
        made = Event()
        self._thread = Thread(target=self._work, args=(make_engine, made), name="engine", daemon=True)
        self._thread.start()
        made.wait()
        if self._failure is not None:
            raise self._failure

    def wait_for_room(self) -> None:
        """Wait until few rows wait, or the engine has failed: no more shards are begun than need be, and those of which
        only a long row is left hold up no others."""
        with self._room:
            self._room.wait_for(lambda: self._failure is not None or self._num_waiting_seqs < self._reach)

    def start(self, run: ShardRun) -> None:
        """Queue a shard's rows; ShardRun.wait() waits for their end."""
        with self._lock:
            if self._failure is None:
                self._runs[id(run)] = run
                self._num_waiting_seqs += sum(row.num_samples for row in run.rows)
                self._arrivals.put(run)
            else:
                run.failure = self._failure
                run.done.set()

    def progress(self) -> list[Progress]:
        with self._lock:
            return [run.progress for run in self._runs.values()]

    def figures(self) -> Figures:
        """As they are now; may be called while a step runs."""
        scheduler, totals = self.engine.scheduler, replace(self.engine.metrics)
        now_s, step = self._clock(), self._stepping  # after the totals, which may have the step already
        if step is not None and step[1] == totals.busy_s:
            totals.busy_s += now_s - step[0]
        return Figures(
            at_s=now_s,
            rows=len(self._running),
            seqs=self._num_seqs + self._num_waiting_seqs,
            waiting_seqs=scheduler.num_waiting + self._num_waiting_seqs,
            free_blocks=scheduler.block_manager.num_free,
            blocks=scheduler.block_manager.num_blocks,
            totals=totals,
        )

    def take_expert_tokens(self) -> list[list[int]] | None:
        """Engine.expert_tokens() as it was lately, and as it is when a shard is done and no other runs; None where that
        was taken before."""
        with self._lock:
            tokens, self._expert_tokens = self._expert_tokens, None
        return tokens

    @property
    def stalled_s(self) -> float:
        """Seconds since the engine last came back from a step; 0 while it has nothing to do."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def fail(self, failure: BaseException) -> None:
        """Fail every shard, those to come too."""
        with self._lock:
            self._failure = self._failure or failure
            for run in self._runs.values():
                run.failure = self._failure
                run.done.set()
            self._runs.clear()
            self._room.notify_all()
        self._arrivals.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread, told to fail, is over."""
        self._thread.join(timeout_s)

    def _work(self, make_engine: "Callable[[], Engine]", made: Event) -> None:
        try:
            self.engine = make_engine()
            self._reach = AHEAD * self.engine.limits.max_num_seqs
            self._waiting = Waiting(self._reach)
        except BaseException as failure:
            self._failure = failure
            return
        finally:
            made.set()
        try:
            while self._failure is None:
                self._take_arrivals()
                self._busy_since_s = self._clock()
                self._fill()
                if self.engine.has_work:
                    self._step()
                if self._clock() - self._experts_at_s > EXPERTS_EVERY_S:
                    self._read_experts()
                self._expire()
        except BaseException as failure:
            self._broke(failure)
            self.fail(failure)

    def _read_experts(self) -> None:
        """In this thread: a read from another one would break a CUDA graph that is just being captured."""
        self._experts_at_s = self._clock()
        tokens = self.engine.expert_tokens().tolist()
        with self._lock:
            self._expert_tokens = tokens

    def _take_arrivals(self) -> None:
        """Queue the rows of new shards; with nothing else to do, wait for one."""
        while not self._arrivals.empty() or not (self._waiting or self._suspects or self._running):
            if self._arrivals.empty():
                self._journal([], is_alone=False)
                self._busy_since_s = None
            run = self._arrivals.get()
            if run is None:
                return
            self._finish_run(run)  # one without rows
            for row in run.rows:
                self._queue(run, row)

    def _queue(self, run: ShardRun, row: Row) -> None:
        suspect = run.suspects.get(row.index)
        if suspect is None:
            is_short = len(row.prompt_token_ids) <= BLOCK_SIZE
            num_cached = none_cached if is_short else self.engine.cached_prefix(row.request(""))
            self._waiting.add(Waiter(run, row, num_cached))
        elif suspect.is_guilty:
            self._stop_waiting([row])
            self._finish_row(run, row, [_failed(row, suspect.ending.code, suspect.message)])
        else:
            self._suspects.append((run, row))

    def _stop_waiting(self, rows: Iterable[Row]) -> None:
        with self._room:
            self._num_waiting_seqs -= sum(row.num_samples for row in rows)
            self._room.notify_all()

    def _fill(self) -> None:
        chosen = self._choose()
        if not chosen:
            return
        running = [(running.run.shard, running.row.index) for running in self._running.values()]
        self._journal([*running, *((run.shard, row.index) for run, row in chosen)], is_alone=self._is_alone)
        self._stop_waiting(row for _, row in chosen)
        for run, row in chosen:
            request_id = str(self._num_requests)
            self._num_requests += 1
            request = row.request(request_id)
            try:
                self.engine.add(request)
            except RequestError as error:
                self._survive(run, row)
                self._finish_row(run, row, [_failed(row, error.code, error.message)])
                continue
            run.prompt_tokens += len(row.prompt_token_ids) + sum(map(len, row.continuations))
            self._running[request_id] = _Running(run, row, request.num_samples, self._clock())
            self._num_seqs += request.num_samples

    def _choose(self) -> list[tuple[ShardRun, Row]]:
        """The rows that enter the engine now."""
        if self._is_alone:
            return []
        if self._suspects:
            self._is_alone = not self._running
            return [self._suspects.popleft()] if self._is_alone else []
        seats = self.engine.limits.max_num_seqs - self._num_seqs
        return [(waiter.run, waiter.row) for waiter in self._waiting.take(seats)]

    def _step(self) -> None:
        start_s = self._clock()
        self._stepping = start_s, self.engine.metrics.busy_s
        outputs = self.engine.step()
        self._stepping = None
        self._share(self._clock() - start_s, outputs)
        for output in outputs:
            running = self._running[output.request_id]
            running.run.generated_tokens += len(output.new_token_ids)
            if output.completion is None:
                continue
            running.samples[output.sample] = output.completion
            if len(running.samples) == running.num_samples:
                samples = [running.samples[i] for i in range(running.num_samples)]
                failed = [sample for sample in samples if sample.error is not None]
                self._leave(output.request_id, failed[:1] or samples)

    def _share(self, seconds: float, outputs: Sequence[Output]) -> None:
        """Divide a step's time between the shards that got something out of it, with that of fruitless ones before."""
        self._unshared_s += seconds
        if outputs:
            each_s, self._unshared_s = self._unshared_s / len(outputs), 0.0
            for output in outputs:
                self._running[output.request_id].run.engine_s += each_s

    def _expire(self) -> None:
        limit_s = self._row_timeout_s
        while limit_s is not None and self._running:
            request_id, oldest = next(iter(self._running.items()))
            seconds = self._clock() - oldest.started_s
            if seconds <= limit_s:
                return
            self.engine.abort(request_id)
            message = f"not done after {seconds:.1f} s; row_timeout_s is {limit_s:g}. Raise it or lower max_tokens."
            self._leave(request_id, [_failed(oldest.row, "row_timeout", message)])

    def _leave(self, request_id: str, completions: list[Completion]) -> None:
        running = self._running.pop(request_id)
        self._num_seqs -= running.num_samples
        running.run.latencies_s[running.row.index] = self._clock() - running.started_s
        self._survive(running.run, running.row)
        self._finish_row(running.run, running.row, completions)

    def _survive(self, run: ShardRun, row: Row) -> None:
        """A row has left the engine; clear it, if it was there alone."""
        if self._is_alone:
            self._is_alone = False
            self._journal([], is_alone=False)  # the process may yet die of something else
            self._survived(run.shard, row.index)

    def _finish_row(self, run: ShardRun, row: Row, completions: list[Completion]) -> None:
        run.completions[row.index] = completions
        self._finish_run(run)

    def _finish_run(self, run: ShardRun) -> None:
        if len(run.completions) == len(run.rows):
            with self._lock:
                self._runs.pop(id(run), None)
                is_last = not self._runs
            if is_last:
                self._read_experts()
            run.done.set()


def _failed(row: Row, code: str, message: str) -> Completion:
    return Completion((), "error", len(row.prompt_token_ids), error=(code, message))
