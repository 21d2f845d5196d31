"""The events of a run: one class for each event that a run writes into _job/events/<run>.jsonl. Pure.

The runtime makes them, and the status, the report and the forecast read them. The names of classes' fields are the keys
of the JSON lines, in this order: other programs read these lines, so neither may change. docs/output.md lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, get_args

from pydantic import TypeAdapter

WORKER = "worker"  # the stage of the actors that hold the model


@dataclass(frozen=True)
class RunStarted:
    """A run began; `rows` and `pending` are the job's rows and those not done.

    versions:  versions of Python, moray, Ray and torch
    """

    name: ClassVar = "started"
    rows: int
    pending: int
    is_retry: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunEnded:
    """A run ended.

    reason:   why the job did not succeed
    pending:  rows that are not done
    ready_s:  seconds in which a worker was ready; None where the driver died
    """

    name: ClassVar = "ended"
    state: str
    reason: str | None
    pending: int
    ready_s: float | None = None


@dataclass(frozen=True)
class RunFailed:
    """The job failed with an exception, whose stack trace this is."""

    name: ClassVar = "failed"
    traceback: str


@dataclass(frozen=True)
class DriverLost:
    """The run's driver or its local Ray died."""

    name: ClassVar = "driver_lost"
    reason: str
    will_restart: bool = False


@dataclass(frozen=True)
class DrainCommanded:
    """The run starts no more shards."""

    name: ClassVar = "drain"
    reason: str | None


@dataclass(frozen=True)
class AbortCommanded:
    """The run stops at once."""

    name: ClassVar = "abort"
    reason: str | None


@dataclass(frozen=True)
class Draining:
    """No more shards start; these are in flight and will be committed."""

    name: ClassVar = "draining"
    shards: Sequence[int]


@dataclass(frozen=True)
class ShardCommitted:
    """A shard's part was published, with so many rows that are ok and that failed."""

    name: ClassVar = "committed"
    shard: int
    ok: int
    failed: int


@dataclass(frozen=True)
class WorkerSample:
    """The load of one worker at one moment.

    seqs:          samples of the rows that it has and has not finished
    waiting_seqs:  those of them that are not part of a step yet
    busy:          share of the time since the sample before in which its engine was in a step
    kv_use:        share of its KV cache in use
    cached_tokens, computed_tokens, preemptions:  totals since it started
    """

    actor: str
    node: str
    seqs: int
    waiting_seqs: int
    busy: float
    kv_use: float
    cached_tokens: int
    computed_tokens: int
    preemptions: int


@dataclass(frozen=True)
class StatsSample:
    """The counts of the job and the load of its workers at one moment. Rows and tokens are the whole job's."""

    name: ClassVar = "figures"
    rows_done: int
    failed_rows: int
    prompt_tokens: int
    generated_tokens: int
    workers: Sequence[WorkerSample]


@dataclass(frozen=True)
class ActorStarted:
    """A process of an actor of a stage began to start on a node."""

    name: ClassVar = "actor_started"
    stage: str
    actor: str
    node: str


@dataclass(frozen=True)
class ActorReady:
    """A process of an actor is ready; a worker also reports its machine and its engine.

    devices:   how many of `device` it uses
    products:  the kernels of its matrix products
    limits:    of its engine, in words
    """

    name: ClassVar = "actor_ready"
    stage: str
    actor: str
    pid: int
    node: str
    host: str | None = None
    device: str | None = None
    dtype: str | None = None
    products: str | None = None
    limits: str | None = None
    devices: int | None = None


@dataclass(frozen=True)
class StartFailed:
    """An actor could not start, for the `failed_in_a_row`th time in a row, and is started again."""

    name: ClassVar = "start_failed"
    stage: str
    actor: str
    node: str
    reason: str
    failed_in_a_row: int


@dataclass(frozen=True)
class ActorLost:
    """A process of an actor that was ready ended, and the actor is started again.

    reason:      why, where it is known
    rows:        how many rows were in it, where that is known
    shard, row:  the first of them
    """

    name: ClassVar = "actor_lost"
    stage: str
    actor: str
    pid: int
    reason: str | None = None
    rows: int | None = None
    shard: int | None = None
    row: int | None = None


@dataclass(frozen=True)
class WorkerHung:
    """A worker's engine finished no step, or the worker sent no report, for `seconds`."""

    name: ClassVar = "worker_hangs"
    actor: str
    pid: int
    seconds: float


@dataclass(frozen=True)
class LogLine:
    """A worker logged a line."""

    name: ClassVar = "log"
    actor: str
    message: str


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens that a process of a worker gave to each expert, by [layers][experts], when it or the run ended."""

    name: ClassVar = "experts"
    actor: str
    tokens: Sequence[Sequence[int]]


@dataclass(frozen=True)
class NoForecast:
    """The rows for the forecast could not be read."""

    name: ClassVar = "no_forecast"
    reason: str


@dataclass(frozen=True)
class RayReport:
    """A daemon of Ray reported something, such as a process that was killed."""

    name: ClassVar = "ray"
    report: str


RunEvent = (
    RunStarted
    | RunEnded
    | RunFailed
    | DriverLost
    | DrainCommanded
    | AbortCommanded
    | Draining
    | ShardCommitted
    | StatsSample
    | ActorStarted
    | ActorReady
    | StartFailed
    | ActorLost
    | WorkerHung
    | LogLine
    | ExpertTokens
    | NoForecast
    | RayReport
)
EVENT_CLASSES: Mapping[str, type[RunEvent]] = {cls.name: cls for cls in get_args(RunEvent)}
_ADAPTERS: Mapping[str, TypeAdapter[RunEvent]] = {name: TypeAdapter(cls) for name, cls in EVENT_CLASSES.items()}


def to_json(event: RunEvent) -> dict[str, Any]:
    """Return the event as a JSON object. Optional fields without a value are left out."""
    values = asdict(event)
    unset = {item.name for item in fields(event) if item.default is None and values[item.name] is None}
    return {"event": event.name} | {name: value for name, value in values.items() if name not in unset}


def from_json(values: Mapping[str, Any]) -> RunEvent | None:
    """Return the event of a JSON object, without the keys that this version of moray does not know.

    Returns None where the event is unknown: a newer version wrote it. Raises ValueError where a field is missing or has
    another type.
    """
    adapter = _ADAPTERS.get(str(values.get("event")))
    return None if adapter is None else adapter.validate_python(values)
