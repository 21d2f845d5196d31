"""Derive the job's runs and their worker processes from the events of its runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from moray.batch.output.event_log import LoggedEvent, logged_runs, read_events
from moray.batch.output.folder import OutputFolder
from moray.batch.run_events import (
    WORKER,
    AbortCommanded,
    ActorLost,
    ActorReady,
    ActorStarted,
    DrainCommanded,
    DriverLost,
    ExpertTokens,
    RayReport,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    ShardCommitted,
    StatsSample,
)

E = TypeVar("E", bound=RunEvent)


@dataclass
class WorkerLifetime:
    """Describes a process of a worker, from its start to its death or the end of its run.

    ready:      when it was ready; None where it never was
    about:      its host, device, dtype and kernels, as far as it reported them
    devices:    how many of that device it uses
    rows:       rows that were in it when it died; None where that is not known
    first_row:  shard and row of the first of them
    """

    actor: str
    node: str
    started: datetime
    ended: datetime
    ready: datetime | None = None
    has_died: bool = False
    pid: int | None = None
    rows: int | None = None
    first_row: tuple[int, int] | None = None
    about: dict[str, str] = field(default_factory=dict)
    devices: int = 1

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


@dataclass(frozen=True)
class RunEvents:
    """Describes a run of a job.

    state:         state at its end; RESTARTED where its driver died and the next run continued it; None where it was
                   killed and wrote no end
    stats:         time and content of each sample of the statistics
    commits:       time and shard of each commit
    rows, pending: rows of the job, and those not done, when the run started
    expert_tokens: tokens by [layers][experts] of each worker process that reported them
    reported_ready_s:  time in which a worker was ready, in seconds, as the run reported it at its end
    reports:       time and text of what Ray's daemons reported and of what went wrong
    """

    name: str
    started: datetime
    ended: datetime
    state: str | None = None
    reason: str | None = None
    rows: int = 0
    pending: int = 0
    is_retry: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    stats: Sequence[tuple[datetime, StatsSample]] = ()
    commits: Sequence[tuple[datetime, int]] = ()
    processes: Sequence[WorkerLifetime] = ()
    expert_tokens: Sequence[Sequence[Sequence[int]]] = ()
    reported_ready_s: float | None = None
    reports: Sequence[tuple[datetime, str]] = ()

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()

    @property
    def ready_s(self) -> float:
        """Return the seconds in which a worker was ready; without the report, those after the first was ready."""
        if self.reported_ready_s is not None:
            return self.reported_ready_s
        return (self.ended - self.first_ready).total_seconds()

    @property
    def first_ready(self) -> datetime:
        """Return when the first worker was ready; where none reported it, when the run started."""
        return min((process.ready for process in self.processes if process.ready is not None), default=self.started)


def read_runs(folder: OutputFolder) -> list[RunEvents]:
    """Read the job's runs, the first one first."""
    runs = [_run(name, read_events(folder, name)) for name in logged_runs(folder)]
    return sorted((run for run in runs if run is not None), key=lambda run: run.started)


def _run(name: str, events: Sequence[LoggedEvent]) -> RunEvents | None:
    if not events:
        return None
    (_, first), *_ = _select(events, RunStarted) or [(events[0].at, RunStarted(rows=0, pending=0))]
    *_, (end, last) = [(events[-1].at, None), *_select(events, RunEnded)]
    is_lost = bool(_select(events, DriverLost))
    return RunEvents(
        name=name,
        started=events[0].at,
        ended=end,
        state=last.state if last is not None else "RESTARTED" if is_lost else None,
        reason=None if last is None else last.reason,
        rows=first.rows,
        pending=first.pending,
        is_retry=first.is_retry,
        versions=first.versions,
        stats=_select(events, StatsSample),
        commits=[(at, committed.shard) for at, committed in _select(events, ShardCommitted)],
        processes=list(_worker_processes(events, end)),
        expert_tokens=[experts.tokens for _, experts in _select(events, ExpertTokens)],
        reported_ready_s=None if last is None else last.ready_s,
        reports=[(logged.at, text) for logged in events if (text := _report(logged.event)) is not None],
    )


def _select(events: Iterable[LoggedEvent], kind: type[E]) -> list[tuple[datetime, E]]:
    """Return the events of one class, each with its time."""
    return [(logged.at, logged.event) for logged in events if isinstance(logged.event, kind)]


def _report(event: RunEvent) -> str | None:
    match event:
        case RayReport(report):
            return f"Ray: {report}"
        case DrainCommanded(reason) | AbortCommanded(reason):
            return f"{event.name}: {reason}"
        case DriverLost(reason):
            return reason
        case RunFailed(traceback):
            return traceback.strip().rpartition("\n")[2]
    return None


def _worker_processes(events: Iterable[LoggedEvent], end: datetime) -> Iterator[WorkerLifetime]:
    """Yield the worker processes of a run.

    An actor that starts again has died before, even without an ActorLost event. A process that is alive at the end of
    the run has not died.
    """
    alive: dict[str, WorkerLifetime] = {}
    for logged in events:
        match logged.event:
            case ActorStarted(stage=stage, actor=actor, node=node) if stage == WORKER:
                if actor in alive:
                    yield _died(alive.pop(actor), logged.at)
                alive[actor] = WorkerLifetime(actor, node, logged.at, end)
            case ActorReady(actor=actor) as ready if actor in alive:
                process = alive[actor]
                process.ready, process.pid, process.devices = logged.at, ready.pid, ready.devices or 1
                about = {name: getattr(ready, name) for name in ("host", "device", "dtype", "products", "limits")}
                process.about.update({name: text for name, text in about.items() if text is not None})
            case ActorLost(actor=actor) as lost if actor in alive:
                yield _died(alive.pop(actor), logged.at, lost)
    yield from alive.values()


def _died(process: WorkerLifetime, at: datetime, lost: ActorLost | None = None) -> WorkerLifetime:
    """Mark a process as dead; without `lost` nothing is known of the rows in it."""
    process.ended, process.has_died = at, True
    if lost is not None:
        process.rows = lost.rows
        if lost.shard is not None and lost.row is not None:
            process.first_row = lost.shard, lost.row
    return process
