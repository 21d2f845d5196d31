"""What a job's runs tell of themselves: events/<run>.jsonl as runs, lives of workers and curves."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from batch.output.folder import JOB, OutputFolder

Event = Mapping[str, Any]


@dataclass
class Life:
    """A process of a worker, from its start to its death or the end of its run.

    ready:  None where it never was
    about:  host, device and dtype, as far as it told
    rows:   how many were in it when it died, where that is known; first_row: shard and row of the first of them
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

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


@dataclass(frozen=True)
class Figures:
    """How a run went at one moment; tokens and rows are the whole job's. workers: as they told."""

    at: datetime
    rows_done: int
    failed_rows: int
    prompt_tokens: int
    generated_tokens: int
    workers: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """
    state:         in which the run ended; None where it was killed and could not say
    commits:       when which shard was committed
    rows, pending: of the job, when the run started
    expert_tokens: of each worker process that told, [layers][experts]
    told_ready_s:  how long a worker was ready, as the run told at its end
    reports:       what Ray's daemons reported, and what went wrong
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
    figures: Sequence[Figures] = ()
    commits: Sequence[tuple[datetime, int]] = ()
    lives: Sequence[Life] = ()
    expert_tokens: Sequence[Sequence[Sequence[int]]] = ()
    told_ready_s: float | None = None
    reports: Sequence[tuple[datetime, str]] = ()

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()

    @property
    def ready_s(self) -> float:
        """How long a worker was ready; of a run that did not tell, from its first worker to its end."""
        if self.told_ready_s is not None:
            return self.told_ready_s
        return (self.ended - self.first_ready).total_seconds()

    @property
    def first_ready(self) -> datetime:
        """When its first worker could begin; where none told, when the run did."""
        return min((life.ready for life in self.lives if life.ready is not None), default=self.started)


def read_runs(folder: OutputFolder) -> list[Run]:
    """The job's runs, the first one first. A line that is cut short, as of a run that was killed, is left out."""
    names = [name for name in folder.names(f"{JOB}/events") if name.endswith(".jsonl")]
    texts = [(name, folder.read(f"{JOB}/events/{name}") or b"") for name in names]
    runs = [_run(name.removesuffix(".jsonl"), list(_parse(text))) for name, text in texts]
    return sorted((run for run in runs if run is not None), key=lambda run: run.started)


def _parse(text: bytes) -> Iterator[Event]:
    for line in text.splitlines():
        try:
            event = json.loads(line)
            yield event | {"at": datetime.fromisoformat(event["at"]), "event": str(event["event"])}
        except (ValueError, TypeError, KeyError):
            continue


def _run(name: str, events: Sequence[Event]) -> Run | None:
    if not events:
        return None
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event["event"], []).append(event)
    first: Event = by_name.get("started", [{}])[0]
    last: Event = by_name.get("ended", [{}])[-1]
    end = last.get("at", events[-1]["at"])
    return Run(
        name=name,
        started=events[0]["at"],
        ended=end,
        state=last.get("state"),
        reason=last.get("reason"),
        rows=first.get("rows", 0),
        pending=first.get("pending", 0),
        is_retry=first.get("is_retry", False),
        versions=first.get("versions", {}),
        figures=[_figures(event) for event in by_name.get("figures", [])],
        commits=[(event["at"], event["shard"]) for event in by_name.get("committed", [])],
        lives=list(_lives(events, end)),
        expert_tokens=[event["tokens"] for event in by_name.get("experts", [])],
        told_ready_s=last.get("ready_s"),
        reports=[(event["at"], text) for event in events if (text := _report(event)) is not None],
    )


def _figures(event: Event) -> Figures:
    names = ("rows_done", "failed_rows", "prompt_tokens", "generated_tokens")
    numbers = {name: event.get(name, 0) for name in names}
    return Figures(at=event["at"], workers=event.get("workers", ()), **numbers)


def _report(event: Event) -> str | None:
    match event["event"]:
        case "ray":
            return f"Ray: {event.get('report')}"
        case "drain" | "abort" as order:
            return f"{order}: {event.get('reason')}"
        case "failed":
            return str(event.get("traceback", "")).strip().rpartition("\n")[2]
    return None


def _lives(events: Iterable[Event], end: datetime) -> Iterator[Life]:
    """An actor that starts again, told lost before or not, has died; what lives at the end of the run lives on."""
    alive: dict[str, Life] = {}
    for event in events:
        if event.get("stage") != "worker":
            continue
        actor = event["actor"]
        match event["event"]:
            case "actor_started":
                if actor in alive:
                    yield _died(alive.pop(actor), event)
                alive[actor] = Life(actor, event.get("node", ""), event["at"], end)
            case "actor_ready" if actor in alive:
                alive[actor].ready, alive[actor].pid = event["at"], event.get("pid")
                about = {name: event[name] for name in ("host", "device", "dtype") if name in event}
                alive[actor].about.update(about)
            case "actor_lost" if actor in alive:
                yield _died(alive.pop(actor), event)
    yield from alive.values()


def _died(life: Life, event: Event) -> Life:
    life.ended, life.has_died = event["at"], True
    life.rows = event.get("rows")
    if "row" in event:
        life.first_row = (event["shard"], event["row"])
    return life
