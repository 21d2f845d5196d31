"""What a job tells while it runs: status.json, replaced whole, and events/<run>.jsonl, one line each."""

import json
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from batch.ledger import Ledger, State
from batch.output.folder import JOB, OutputFolder
from batch.watch.event_log import EventLog, now
from batch.watch.pace import Meter, Pace
from batch.watch.workers import Workers

STATUS = f"{JOB}/status.json"
LOCAL_EVERY_S, REMOTE_EVERY_S = 1.0, 10.0
FIGURES_EVERY_S = 10.0  # twice as long whenever as many as the next line says were written: a weekend stays small
FIGURES_AT_A_PACE = 360


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job at one moment. rows_done counts rows that are finished but not committed too; tokens do as well.

    output:             the folder, as the spec has it
    reason:             why the job did not succeed, or why it is being stopped
    tokens_per_s:       generated tokens (of a job that scores: prompt tokens), of this run: lately while it runs; at
                        the end all of them, over the time in which a worker was ready. So is prompt_tokens_per_s, and
                        so are busy and kv_use
    eta_s:              None = not known yet; eta_low_s to eta_high_s is its range, see Pace
    workers:            that hold the model and were heard of lately
    workers_starting:   that have a place and load the model
    busy, kv_use:       share of the workers' time in steps, of their KV caches in use
    max_failed_rows:    None = no limit
    worker_s, card_s:   how long workers and their GPUs were held, all together, by all runs of the job
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
    busy: float = 0.0
    kv_use: float = 0.0
    worker_s: float = 0.0
    card_s: float = 0.0
    max_failed_rows: int | None = None
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_too_many_failures(self) -> bool:
        """Nothing goes on before the limit is raised."""
        return self.max_failed_rows is not None and self.failed_rows > self.max_failed_rows

    @property
    def exit_code(self) -> int:
        """Of a run that ended like this: 0 succeeded, 1 failed, 128 + the signal's number."""
        if self.state is State.CANCELLED:
            return 128 + signal.Signals[str(self.reason)]
        return 0 if self.state is State.SUCCEEDED else 1

    def to_json(self) -> str:
        values = asdict(self) | {"updated_at": now()}
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> tuple["Status", datetime]:
        """With the time at which it was written. Of other versions too: what they lack has its default."""
        values = json.loads(text)
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        return cls(**known | {"state": State(known["state"])}), datetime.fromisoformat(values["updated_at"])


def read_status(folder: OutputFolder) -> tuple[Status, datetime] | None:
    """What status.json tells, and when it was written; None where there is none, or what is there is damaged.

    Raises OutputError where that cannot be found out.
    """
    content = folder.read(STATUS)
    try:
        return None if content is None else Status.from_json(content.decode())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Reporter:
    """Turns the ledger into Status, and writes it: every second to a disk, every ten to an object store. What cannot be
    written now is tried again with the next: a job does not end for want of a status.

    clock:       seconds, monotonic
    workers:     kept up to date by whoever has this
    is_scoring:  the job generates nothing
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
    ) -> None:
        self.name = name
        self.run = run
        self._ledger = ledger
        self._folder = folder
        self._clock = clock
        self._workers = workers
        self._is_scoring = is_scoring
        self._started = clock()
        self._ended: float | None = None
        self._tokens_before = ledger.prompt_tokens, ledger.generated_tokens
        self._meter, self._pace = Meter(), Pace()
        self._num_figures, self._figures_due_s = 0, self._started + FIGURES_EVERY_S
        self._every_s = LOCAL_EVERY_S if folder.is_local else REMOTE_EVERY_S
        self._written: tuple[State, float] | None = None  # what, and when
        self._log = EventLog(run, folder, clock)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def end(self) -> None:
        """The job is over; what is told of it from now on is told of this moment."""
        if self._ended is None:
            self._ended = self._clock()

    @property
    def ready_s(self) -> float:
        """How long a worker was ready in this run: what its speed is measured by."""
        return self._workers.ready_s(self._clock() if self._ended is None else self._ended)

    def _whole_rates(self) -> tuple[float, float]:
        """Prompt and generated tokens a second, over all of the run."""
        seconds = self.ready_s
        before_prompt, before_generated = self._tokens_before
        prompt, generated = self._ledger.prompt_tokens - before_prompt, self._ledger.generated_tokens - before_generated
        return (prompt / seconds, generated / seconds) if seconds > 0 else (0.0, 0.0)

    def status(self) -> Status:
        """How the job is now; to be asked for often, since speed is measured from one time to the next."""
        ledger, workers = self._ledger, self._workers
        now_s = self._clock() if self._ended is None else self._ended
        is_final = ledger.state.is_final
        if ledger.state is State.PENDING and not workers.num_alive(now_s):
            self._meter = Meter()  # what is told of first was made since a worker was there
        self._meter.mark(now_s, ledger.prompt_tokens, ledger.generated_tokens)
        rows_inside = sum(one.rows for one in workers.latest(now_s))
        self._pace.mark(now_s, ledger.rows_done, workers.num_alive(now_s), rows_inside)
        prompt_tokens_per_s, generated_tokens_per_s = self._whole_rates() if is_final else self._meter.rates()
        left = None if is_final else self._pace.time_left(ledger.num_rows - ledger.rows_done, rows_inside)
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
            shards=len(ledger.rows_of),
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
            busy=round(workers.busy(now_s), 3),
            kv_use=round(workers.kv_use(now_s), 3),
            worker_s=round(workers.worker_s(now_s), 1),
            card_s=round(workers.card_s(now_s), 1),
            max_failed_rows=ledger.max_failed_rows,
            errors={code: count for code, count in ledger.errors.most_common() if count},
        )

    def record(self, event: str, **fields: Any) -> None:
        """Add a line to this run's events."""
        self._log.add(event, fields)

    def record_figures(self, *, at_once: bool = False) -> None:
        """Add a line with the figures of all workers, where it is time for one."""
        now_s = self._clock()
        if not at_once and now_s < self._figures_due_s:
            return
        self._num_figures += 1
        self._figures_due_s = now_s + FIGURES_EVERY_S * 2.0 ** (self._num_figures // FIGURES_AT_A_PACE)
        ledger = self._ledger
        self.record(
            "figures",
            rows_done=ledger.rows_done,
            failed_rows=ledger.failed,
            prompt_tokens=ledger.prompt_tokens,
            generated_tokens=ledger.generated_tokens,
            workers=self._workers.describe(now_s),
        )

    def write(self, status: Status, *, at_once: bool = False) -> None:
        """Write status.json, and the events, unless they were written a moment ago with the same state."""
        now_s = self._clock()
        if not at_once and self._written is not None:
            state, written_s = self._written
            if status.state is state and now_s - written_s < self._every_s:
                return
        self._written = status.state, now_s
        with suppress(OSError):
            self._folder.write(STATUS, status.to_json().encode(), durable=at_once)
        self._log.flush(at_once=at_once)
