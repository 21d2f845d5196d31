"""Monitor: the Ray actor that driver and stages share. Orders go out; progress, failures and notes come in."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch.forecast.sample import Sample
from batch.ledger import Order, Progress, WorkerLost
from batch.quarantine import InFlight, Quarantine
from engine.errors import JobError, MorayError

MAX_STARTS = 3  # of one actor without being ready once in between


Note = tuple[str, dict[str, Any]]  # an event of the run: its name and its fields


@dataclass
class News:
    """What happened since the driver last asked.

    progress:  of the shards in flight, as it is now
    admitted:  shards that were let into a worker, once no more are; None before
    sample:    of the input, once it is taken
    """

    progress: list[Progress] = field(default_factory=list)
    lost: list[WorkerLost] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    admitted: list[int] | None = None
    sample: Sample | None = None
    failure: MorayError | None = None


class MonitorState:
    """What the actor holds. Actors are known by Ray's actor id; one that Ray started again keeps its id."""

    def __init__(self) -> None:
        self._order: Order | None = None
        self._admitted: set[int] = set()
        self._is_sampled = False
        self._starts: Counter[str] = Counter()
        self._pids: dict[str, int] = {}
        self._progress: dict[str, dict[int, Progress]] = {}  # by actor
        self._expert_tokens: dict[str, list[list[int]]] = {}  # by actor
        self._news = News()
        self._quarantine = Quarantine()

    def is_open(self) -> bool:
        """Whether new shards may start."""
        return self._order is None

    def admit(self, shard: int) -> dict[int, int] | None:
        """Let a shard into a worker, with its suspects; None where it may not start any more."""
        if self._order is not None:
            return None
        self._admitted.add(shard)
        return self._quarantine.suspects(shard)

    def clear(self, shard: int, row: int) -> None:
        """A suspect survived."""
        self._quarantine.clear((shard, row))

    def start(self, actor: str, stage: str, node: str, died: InFlight | None = None) -> None:
        """An actor begins to get ready, after one of its processes died with these rows in it, where that is known.

        Raises JobError where it did so too often: Ray would try forever.
        """
        if actor in self._pids:
            has_suspects = died is not None
            self._news.lost.append(WorkerLost(actor, sorted(self._progress.pop(actor, {})), has_suspects))
            lost: dict[str, Any] = {"stage": stage, "actor": actor, "pid": self._pids.pop(actor)}
            if died is not None:
                lost |= {"rows": len(died.rows), "shard": died.rows[0][0], "row": died.rows[0][1]}
                self._quarantine.blame(died)
            self._news.notes.append(("actor_lost", lost))
            if actor in self._expert_tokens:
                self._news.notes.append(_experts(actor, self._expert_tokens.pop(actor)))
        self._starts[actor] += 1
        if self._starts[actor] > MAX_STARTS:
            raise JobError(f"{stage} was killed {MAX_STARTS} times while it started; is there enough memory?")
        self._news.notes.append(("actor_started", {"stage": stage, "actor": actor, "node": node}))

    def ready(self, actor: str, stage: str, pid: int, node: str, about: Mapping[str, str]) -> None:
        """about: more to say of it"""
        self._starts[actor] = 0
        self._pids[actor] = pid
        self._news.notes.append(("actor_ready", {"stage": stage, "actor": actor, "pid": pid, "node": node, **about}))

    def report(self, actor: str, progress: Sequence[Progress], log: Sequence[str]) -> Order | None:
        """A worker's shards in flight and what it logged; returns what it is to do."""
        self._progress[actor] = {item.shard: item for item in progress}
        self._news.notes += [("log", {"actor": actor, "message": line}) for line in log]
        return self._order

    def tell_experts(self, actor: str, tokens: list[list[int]]) -> None:
        """A worker's tokens by layer and expert, since it started."""
        self._expert_tokens[actor] = tokens

    def experts(self) -> list[Note]:
        """Of workers that have not died."""
        return [_experts(actor, tokens) for actor, tokens in self._expert_tokens.items()]

    def claim_sample(self) -> bool:
        """Whether the caller is to take the sample; only the first one is."""
        claimed, self._is_sampled = self._is_sampled, True
        return not claimed

    def give_sample(self, sample: Sample | None, reason: str = "") -> None:
        """reason: why there is none"""
        self._news.sample = sample
        if sample is None:
            self._news.notes.append(("no_forecast", {"reason": reason}))

    def fail(self, failure: MorayError) -> None:
        self._news.failure = self._news.failure or failure

    def poll(self, order: Order | None) -> News:
        """The driver's: pass on what is ordered, get the news."""
        self._order = order
        news, self._news = self._news, News(failure=self._news.failure)
        news.admitted = None if order is None else sorted(self._admitted)
        news.progress = [item for shards in self._progress.values() for item in shards.values()]
        return news


def _experts(actor: str, tokens: list[list[int]]) -> Note:
    return "experts", {"actor": actor, "tokens": tokens}


def start_monitor(name: str) -> Any:
    """On the driver's node, which no scaling down or spot market takes. Without restarts: a job whose monitor is gone
    must end, since nobody could stop it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
    return ray.remote(MonitorState).options(**options).remote()


def journal_path() -> Path:
    """Of this actor: in Ray's folder on this machine, which goes with the session. It keeps its name when the actor is
    started again; on another machine there is none, and a machine that is lost says nothing against a row."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), f"moray-{context.get_actor_id()}.rows")


class Stage:
    """A stage's side of the monitor, for the actor it is made in."""

    def __init__(self, monitor: str, stage: str, died: InFlight | None = None) -> None:
        """died: what this actor's last process left. Raises JobError where this actor has died too often."""
        context = ray.get_runtime_context()
        self._monitor = ray.get_actor(monitor)
        self._stage = stage
        self._actor, self._node = context.get_actor_id(), context.get_node_id()
        with self.telling():
            ray.get(self._monitor.start.remote(self._actor, stage, self._node, died))

    def ready(self, **about: str) -> None:
        """about: more to say of this actor"""
        ray.get(self._monitor.ready.remote(self._actor, self._stage, os.getpid(), self._node, about))

    def is_open(self) -> bool:
        return bool(ray.get(self._monitor.is_open.remote()))

    def admit(self, shard: int) -> dict[int, int] | None:
        suspects: Any = ray.get(self._monitor.admit.remote(shard))
        return None if suspects is None else dict(suspects)

    def clear(self, shard: int, row: int) -> None:
        ray.get(self._monitor.clear.remote(shard, row))

    def report(self, progress: Sequence[Progress], log: Sequence[str]) -> Order | None:
        answer: Any = ray.get(self._monitor.report.remote(self._actor, progress, log))
        return None if answer is None else Order(answer)

    def tell_experts(self, tokens: list[list[int]]) -> None:
        """Without waiting for an answer."""
        self._monitor.tell_experts.remote(self._actor, tokens)

    def sample(self, take: Callable[[], Sample]) -> None:
        """Take the job's sample, unless another actor does. Rows that cannot be read are no failure: not yet."""
        if not ray.get(self._monitor.claim_sample.remote()):
            return
        try:
            found: tuple[Sample | None, str] = take(), ""
        except Exception as error:
            found = None, f"{type(error).__name__}: {error}"
        ray.get(self._monitor.give_sample.remote(*found))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the driver of an exception; Ray passes on only its text, and not always."""
        try:
            yield
        except Exception as error:
            told = error if isinstance(error, MorayError) else JobError(f"{type(error).__name__}: {error}")
            ray.get(self._monitor.fail.remote(told))
            raise
