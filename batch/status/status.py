"""Status and Reporter: what a job reports while it runs.

status.json is replaced as a whole; events/<run>.jsonl gets one line per event.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime

from moray.batch.ledger import Ledger, State
from moray.batch.output.event_log import EventLog, now
from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.run_events import RunEvent, StatsSample
from moray.batch.status.eta import EtaEstimator, ThroughputMeter
from moray.batch.status.restart import Restart
from moray.batch.status.workers import Workers

STATUS = f"{JOB}/status.json"
LOCAL_EVERY_S, REMOTE_EVERY_S = 1.0, 10.0  # seconds between writes of the status, to a disk and to an object store
# Seconds between two `figures` events. They double after every STATS_PER_INTERVAL events, so that the log of a run of
# a weekend stays small.
STATS_EVERY_S = 10.0
STATS_PER_INTERVAL = 360


@dataclass(frozen=True, kw_only=True)
class Status:
    """Describes a job at one moment. rows_done and the tokens include rows that are finished but not committed.

    output:            the output folder, as the spec has it
    reason:            why the job did not succeed, or why it is being stopped
    tokens_per_s:      generated tokens per second of this run, or prompt tokens in a scoring job: over the last seconds
                       while it runs, and in the end all of them over the time in which a worker was ready. The same
                       holds for prompt_tokens_per_s, busy and kv_use
    eta_s:             seconds to the end; None = not known yet. eta_low_s to eta_high_s is its range, see EtaEstimator
    workers:           workers that hold the model and have reported recently
    workers_starting:  workers that are placed on a node and load the model
    worker_gpus:       GPUs of each worker; 0 = it has none, or the run has not begun
    busy, kv_use:      share of the workers' time spent in steps, and of their KV caches in use
    max_num_seqs, max_num_batched_tokens:  the limits of a worker's step, the lowest where workers differ; 0 until known
    lowered_limits:    how often workers of this run lowered them because memory ran out
    copied_rows:       rows of committed shards that got the answer of an equal row; their tokens count like others'
    max_failed_rows:   limit of failed rows; None = no limit
    worker_s, card_s:  seconds that workers and their GPUs (`card_s`: the name in the file) were held, summed over all
                       runs of the job
    warnings:          what a person should know about the job's input and prompts, one line each
    restarts:          how often the driver died and was restarted; restart_reason: why the last time
    errors:            failed rows by error code
    cut_rows:          rows that are ok with a structured output that max_tokens cut
    """

    name: str
    run: str
    output: str
    state: State
    reason: str | None
    input_rows: int
    ok_rows: int
    failed_rows: int
    pending_rows: int
    rows_done: int
    shards: int
    committed_shards: int
    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float = 0.0
    tokens_per_s: float
    elapsed_s: float
    eta_s: float | None
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    workers: int = 0
    workers_starting: int = 0
    worker_gpus: float = 0.0
    busy: float = 0.0
    kv_use: float = 0.0
    worker_s: float = 0.0
    card_s: float = 0.0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    lowered_limits: int = 0
    copied_rows: int = 0
    max_failed_rows: int | None = None
    restarts: int = 0
    restart_reason: str | None = None
    errors: Mapping[str, int] = field(default_factory=dict)
    cut_rows: int = 0
    warnings: Sequence[str] = ()

    @property
    def has_too_many_failures(self) -> bool:
        """Return whether the job cannot continue before the limit of failed rows is raised."""
        return self.max_failed_rows is not None and self.failed_rows > self.max_failed_rows

    @property
    def exit_code(self) -> int:
        """Return the exit code of a run that ended like this: 0 succeeded, 1 failed, 128 + the signal's number."""
        if self.state is State.CANCELLED:
            return 128 + signal.Signals[str(self.reason)]
        return 0 if self.state is State.SUCCEEDED else 1

    def to_json(self) -> str:
        values = asdict(self) | {"updated_at": now()}
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> tuple["Status", datetime]:
        """Return the status and the time at which it was written.

        The text may come from another version of moray: fields that are missing get their defaults.
        """
        values = json.loads(text)
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        known |= {"state": State(known["state"]), "warnings": tuple(known.get("warnings", ()))}
        return cls(**known), datetime.fromisoformat(values["updated_at"])


def read_status(folder: OutputFolder) -> tuple[Status, datetime] | None:
    """Return what status.json holds and when it was written; None where there is none, or it is damaged.

    Raises OutputError where the folder cannot be read.
    """
    content = folder.read(STATUS)
    try:
        return None if content is None else Status.from_json(content.decode())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Reporter:
    """Derives the job's status from the ledger and writes it: every second to a disk, every ten to an object store.

    What cannot be written now is tried again with the next status: a job does not end because its status cannot be
    written.

    clock:       seconds, monotonic
    workers:     the job's workers, kept up to date by the caller
    is_scoring:  True where the job generates nothing
    restart:     why the driver was started in place of another one
    """

    def __init__(
        self,
        name: str,
        run: str,
        ledger: Ledger,
        folder: OutputFolder,
        clock: Callable[[], float],
        workers: Workers,
        *,
        is_scoring: bool = False,
        warnings: Sequence[str] = (),
        restart: Restart | None = None,
    ) -> None:
        self.name = name
        self.run = run
        self._ledger = ledger
        self._folder = folder
        self._clock = clock
        self._workers = workers
        self._is_scoring = is_scoring
        self.warnings = list(warnings)
        self._restart = restart
        self._started = clock()
        self._ended: float | None = None
        self._tokens_before = ledger.prompt_tokens, ledger.generated_tokens
        self._meter, self._eta = ThroughputMeter(), EtaEstimator()
        self._num_stats, self._stats_due_s = 0, self._started + STATS_EVERY_S
        self._every_s = LOCAL_EVERY_S if folder.is_local else REMOTE_EVERY_S
        self._last_write: tuple[State, float] | None = None  # the state that was last written, and when
        self._log = EventLog(run, folder, clock)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    @property
    def began_s(self) -> float:
        """Return when the job began, by the clock: this run, or the first one where the driver was restarted."""
        return self._started if self._restart is None else self._restart.began_s

    @property
    def job_elapsed_s(self) -> float:
        """Return the seconds since the job began, including the driver's restarts."""
        return self._clock() - self.began_s

    def end(self) -> None:
        """Mark the job as over: every later status describes this moment."""
        if self._ended is None:
            self._ended = self._clock()

    @property
    def ready_s(self) -> float:
        """Return the seconds for which a worker was ready in this run, as events hold them: in microseconds.

        The speed of the run is measured over these, here and in the report.
        """
        return round(self._workers.ready_s(self._clock() if self._ended is None else self._ended), 6)

    def _overall_rates(self) -> tuple[float, float]:
        """Return prompt and generated tokens per second over the whole run."""
        seconds = self.ready_s
        before_prompt, before_generated = self._tokens_before
        prompt, generated = self._ledger.prompt_tokens - before_prompt, self._ledger.generated_tokens - before_generated
        return (prompt / seconds, generated / seconds) if seconds > 0 else (0.0, 0.0)

    def status(self) -> Status:
        """Return the present status. Call it often, because speed is measured from one call to the next."""
        ledger, workers = self._ledger, self._workers
        now_s = self._clock() if self._ended is None else self._ended
        is_final = ledger.state.is_final
        if ledger.state is State.PENDING and not workers.num_alive(now_s):
            self._meter = ThroughputMeter()  # the tokens reported first were made since a worker was ready
        self._meter.mark(now_s, ledger.prompt_tokens, ledger.generated_tokens)
        rows_in_engines = sum(worker.rows for worker in workers.latest_stats(now_s))
        self._eta.mark(now_s, ledger.rows_done, workers.num_alive(now_s), rows_in_engines)
        prompt_tokens_per_s, generated_tokens_per_s = self._overall_rates() if is_final else self._meter.rates()
        max_num_seqs, max_num_batched_tokens = workers.limits(now_s)
        left = None if is_final else self._eta.time_left(ledger.num_rows - ledger.rows_done, rows_in_engines)
        return Status(
            name=self.name,
            run=self.run,
            output=self._folder.path,
            state=ledger.state,
            reason=ledger.reason if is_final else ledger.stopping_reason,
            input_rows=ledger.num_rows,
            ok_rows=ledger.ok,
            failed_rows=ledger.failed,
            pending_rows=ledger.pending,
            rows_done=ledger.rows_done,
            shards=len(ledger.shard_rows),
            committed_shards=len(ledger.committed),
            prompt_tokens=ledger.prompt_tokens,
            generated_tokens=ledger.generated_tokens,
            prompt_tokens_per_s=round(prompt_tokens_per_s, 1),
            tokens_per_s=round(prompt_tokens_per_s if self._is_scoring else generated_tokens_per_s, 1),
            elapsed_s=round(now_s - self._started, 1),
            eta_s=None if left is None else round(left.seconds, 1),
            eta_low_s=None if left is None or left.low_s is None else round(left.low_s, 1),
            eta_high_s=None if left is None or left.high_s is None else round(left.high_s, 1),
            workers=workers.num_alive(now_s),
            workers_starting=workers.num_starting,
            worker_gpus=workers.gpus_each,
            busy=round(workers.busy(now_s), 3),
            kv_use=round(workers.kv_use(now_s), 3),
            worker_s=round(workers.worker_s(now_s), 1),
            card_s=round(workers.gpu_s(now_s), 1),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            lowered_limits=workers.totals.lowered_limits,
            copied_rows=ledger.copied,
            max_failed_rows=ledger.max_failed_rows,
            restarts=0 if self._restart is None else self._restart.number,
            restart_reason=None if self._restart is None else self._restart.reason,
            errors={code: count for code, count in ledger.errors.most_common() if count},
            cut_rows=ledger.cut,
            warnings=tuple(self.warnings),
        )

    def record(self, event: RunEvent) -> None:
        """Add an event to this run's log."""
        self._log.add(event)

    def record_stats(self, *, at_once: bool = False) -> None:
        """Add an event with the statistics of all workers, when one is due or `at_once` is set."""
        now_s = self._clock()
        if not at_once and now_s < self._stats_due_s:
            return
        self._num_stats += 1
        self._stats_due_s = now_s + STATS_EVERY_S * 2.0 ** (self._num_stats // STATS_PER_INTERVAL)
        ledger = self._ledger
        self.record(
            StatsSample(
                rows_done=ledger.rows_done,
                failed_rows=ledger.failed,
                prompt_tokens=ledger.prompt_tokens,
                generated_tokens=ledger.generated_tokens,
                workers=self._workers.sample(now_s),
            )
        )

    def write(self, status: Status, *, at_once: bool = False) -> None:
        """Write status.json and the events, unless the same state was written a moment ago."""
        now_s = self._clock()
        if not at_once and self._last_write is not None:
            state, written_s = self._last_write
            if status.state is state and now_s - written_s < self._every_s:
                return
        self._last_write = status.state, now_s
        with suppress(OSError):
            self._folder.write(STATUS, status.to_json().encode(), durable=at_once)
        self._log.flush(at_once=at_once)
