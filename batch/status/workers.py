"""Workers: the job's workers as the driver sees them, how busy they are and how long they were held. Pure."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from moray.batch.run_events import WORKER, ActorLost, ActorReady, ActorStarted, RunEvent, WorkerSample
from moray.batch.worker.stats import WorkerStats
from moray.engine.metrics import Metrics

HEARTBEAT_TIMEOUT_S = 15.0  # seconds without a report after which a worker is not counted; it reports every second
WINDOW_S = 10.0  # seconds over which the workers' busy share is measured


@dataclass
class WorkerProcess:
    """Holds what is known of one process of a worker.

    node:              id of its node
    started_s:         when it started, by the driver's clock
    last_heartbeat_s:  when it last reported, by the driver's clock; None = it is still starting
    first:             its first statistics
    recent:            its statistics over WINDOW_S
    last_recorded:     its statistics when they were last written to the events
    """

    node: str
    started_s: float
    last_heartbeat_s: float | None = None
    first: WorkerStats | None = None
    recent: deque[WorkerStats] = field(default_factory=deque)
    last_recorded: WorkerStats | None = None

    @property
    def last(self) -> WorkerStats | None:
        return self.recent[-1] if self.recent else None


class Workers:
    """Tracks the processes of a job's workers. Times are the driver's, in seconds.

    worker_s, gpu_s:  seconds that workers and GPUs were held by earlier runs of the job
    gpus_each:        GPUs of a worker; 0 until it is known
    """

    def __init__(self, worker_s: float = 0.0, gpu_s: float = 0.0) -> None:
        self.gpus_each = 0.0
        self._worker_s, self._gpu_s = worker_s, gpu_s
        self._processes: dict[str, WorkerProcess] = {}  # by actor
        self._ended_s = 0.0  # worker seconds held by processes that ended
        self._ready_since_s: float | None = None  # since when at least one worker has been ready
        self._ready_until_s = 0.0  # when the last worker that ended since then was last ready
        self._ready_spans: list[tuple[float, float]] = []  # spans with a ready worker that are over
        self._limits = 0, 0  # of a step, as last seen
        self._ended_totals = Metrics()  # engine totals of processes that ended
        # over the whole run: seconds the engines were busy, seconds watched, and seconds x share of the KV cache in use
        self._busy_s = self._span_s = self._used_s = 0.0

    def on_event(self, event: RunEvent, now_s: float) -> None:
        """Record an event of the run where it is about a worker; other events are ignored."""
        match event:
            case ActorStarted(stage, actor, node) if stage == WORKER:
                self._end(actor, now_s)
                self._processes[actor] = WorkerProcess(node, now_s)
            case ActorReady(stage, actor) if stage == WORKER and actor in self._processes:
                self._processes[actor].last_heartbeat_s = now_s
                self._ready_since_s = now_s if self._ready_since_s is None else min(now_s, self._ready_since_s)
            case ActorLost(stage, actor) if stage == WORKER:
                self._end(actor, now_s)

    def update_stats(self, actor: str, stats: WorkerStats, now_s: float) -> None:
        """Record a worker's statistics.

        Statistics of a worker that is not ready are ignored: they are left over from a process that died.
        """
        process = self._processes.get(actor)
        if process is None or process.last_heartbeat_s is None:
            return
        before, process.last_heartbeat_s = process.last, now_s
        process.first = process.first or stats
        if before is not None:
            seconds = stats.at_s - before.at_s
            self._span_s += seconds
            self._busy_s += seconds * _busy_share(before, stats)
            self._used_s += seconds * stats.used_blocks / max(1, stats.blocks)
        process.recent.append(stats)
        while len(process.recent) > 2 and process.recent[1].at_s <= stats.at_s - WINDOW_S:
            process.recent.popleft()

    def end(self, now_s: float) -> None:
        """End all workers' processes, because the run is over."""
        for actor in list(self._processes):
            self._end(actor, now_s)

    def num_alive(self, now_s: float) -> int:
        """Return the number of workers that hold the model and have reported recently."""
        return sum(
            process.last_heartbeat_s is not None and _is_held(process, now_s) for process in self._processes.values()
        )

    @property
    def num_starting(self) -> int:
        return sum(process.last_heartbeat_s is None for process in self._processes.values())

    def busy(self, now_s: float) -> float:
        """Return the share of time in which the engines were in a step.

        It is that of the last seconds; once the run is over, that of the whole run.
        """
        shares = [_busy_share(process.recent[0], process.recent[-1]) for _, process in self._reporting(now_s)]
        if shares:
            return sum(shares) / len(shares)
        return self._busy_s / self._span_s if self._span_s else 0.0

    def kv_use(self, now_s: float) -> float:
        """Return the share of the KV caches that is in use now; once the run is over, the mean of the whole run."""
        last = [process.recent[-1] for _, process in self._reporting(now_s)]
        if last:
            return sum(stats.used_blocks for stats in last) / max(1, sum(stats.blocks for stats in last))
        return self._used_s / self._span_s if self._span_s else 0.0

    def latest_stats(self, now_s: float) -> list[WorkerStats]:
        """Return the latest statistics of each worker that is alive."""
        return [process.recent[-1] for _, process in self._reporting(now_s)]

    def limits(self, now_s: float) -> tuple[int, int]:
        """Return the limits of a step, in sequences and in tokens: the lowest where workers that are alive differ.

        Once the run is over, those of its last moment; 0 until a worker has reported.
        """
        found = [(stats.max_num_seqs, stats.max_num_batched_tokens) for stats in self.latest_stats(now_s)]
        if found:
            self._limits = min(found)
        return self._limits

    def worker_s(self, now_s: float) -> float:
        """Return for how many seconds workers were held, from their start to their last report.

        They are summed over all workers and all runs of the job.
        """
        return self._worker_s + self._held_s(now_s)

    def ready_s(self, now_s: float) -> float:
        """Return for how many seconds of this run at least one worker was ready."""
        spans = list(self._ready_spans)
        if self._ready_since_s is not None:
            held = [
                _held_until(process, now_s)
                for process in self._processes.values()
                if process.last_heartbeat_s is not None
            ]
            spans.append((self._ready_since_s, max([self._ready_until_s, *held])))
        return sum(max(0.0, min(until, now_s) - since) for since, until in spans)

    def gpu_s(self, now_s: float) -> float:
        """Return for how many seconds GPUs were held by workers, summed as in worker_s."""
        return self._gpu_s + self.gpus_each * self._held_s(now_s)

    @property
    def totals(self) -> Metrics:
        """Return the sum of the totals of all engines of this run, including those of workers that died."""
        last = [process.last.totals for process in self._processes.values() if process.last is not None]
        return _sum(self._ended_totals, *last)

    def sample(self, now_s: float) -> list[WorkerSample]:
        """Return the load of each worker that is alive; busy is measured since the previous call."""
        return [_sample(actor, process) for actor, process in self._reporting(now_s)]

    def _reporting(self, now_s: float) -> Iterator[tuple[str, WorkerProcess]]:
        """Yield the workers that are alive and have sent statistics."""
        for actor, process in self._processes.items():
            if process.recent and _is_held(process, now_s):
                yield actor, process

    def _held_s(self, now_s: float) -> float:
        return self._ended_s + sum(
            _held_until(process, now_s) - process.started_s for process in self._processes.values()
        )

    def _end(self, actor: str, now_s: float) -> None:
        process = self._processes.pop(actor, None)
        if process is not None:
            until = _held_until(process, now_s)
            self._ended_s += until - process.started_s
            if process.last_heartbeat_s is not None:
                self._ready_until_s = max(self._ready_until_s, until)
                self._close_span()
            if process.last is not None:
                self._ended_totals = _sum(self._ended_totals, process.last.totals)

    def _close_span(self) -> None:
        """End the span with a ready worker, where no worker is ready any more."""
        if self._ready_since_s is not None and all(
            process.last_heartbeat_s is None for process in self._processes.values()
        ):
            self._ready_spans.append((self._ready_since_s, self._ready_until_s))
            self._ready_since_s = None


def _is_held(process: WorkerProcess, now_s: float) -> bool:
    return process.last_heartbeat_s is None or now_s - process.last_heartbeat_s <= HEARTBEAT_TIMEOUT_S


def _held_until(process: WorkerProcess, now_s: float) -> float:
    """Return until when a worker was held: Ray does not announce that it released one, so its last heartbeat counts."""
    return now_s if process.last_heartbeat_s is None or _is_held(process, now_s) else process.last_heartbeat_s


def _busy_share(before: WorkerStats, after: WorkerStats) -> float:
    seconds = after.at_s - before.at_s
    if seconds <= 0:
        return 0.0
    return min(1.0, max(0.0, (after.totals.busy_s - before.totals.busy_s) / seconds))


def _sum(*all_totals: Metrics) -> Metrics:
    names = asdict(Metrics())
    return Metrics(**{name: sum(getattr(totals, name) for totals in all_totals) for name in names})


def _sample(actor: str, process: WorkerProcess) -> WorkerSample:
    last, last_recorded = process.recent[-1], process.last_recorded or process.first
    assert last_recorded is not None, "a process with recent statistics has first ones"
    process.last_recorded = last
    return WorkerSample(
        actor=actor,
        node=process.node,
        seqs=last.seqs,
        waiting_seqs=last.waiting_seqs,
        busy=round(_busy_share(last_recorded, last), 3),
        kv_use=round(last.used_blocks / max(1, last.blocks), 3),
        cached_tokens=last.totals.cached_tokens,
        computed_tokens=last.totals.computed_tokens,
        preemptions=last.totals.preemptions,
    )
