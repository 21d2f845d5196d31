"""Monitor: the Ray actor that driver and stages share. Orders go out; progress, failures and notes come in."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch.faults.quarantine import KILLED, Ending, InFlight, Quarantine, Suspect
from batch.faults.watchdog import Stall
from batch.forecast.sample import Sample
from batch.ledger import Order, Progress, WorkerLost
from batch.watch.figures import Figures
from engine.errors import JobError, MorayError

SILENT_S = 5.0  # a worker reports every second
MAX_STARTS = 3  # of one actor without being ready once in between


Note = tuple[str, dict[str, Any]]  # an event of the run: its name and its fields


@dataclass
class News:
    """What happened since the driver last asked.

    progress:  of the shards in flight, as it is now
    ready_s:   by actor, how long ago those became ready of which the notes tell it
    figures:   by actor, of those that have told of themselves since
    stalls:    workers that have done nothing for SILENT_S; one that is gone for good is among them
    admitted:  shards that were let into a worker, once no more are; None before
    sample:    of the input, once it is taken
    """

    progress: list[Progress] = field(default_factory=list)
    ready_s: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figures] = field(default_factory=dict)
    lost: list[WorkerLost] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    admitted: list[int] | None = None
    sample: Sample | None = None
    failure: MorayError | None = None


class MonitorState:
    """What the actor holds. Actors are known by Ray's actor id; one that Ray started again keeps its id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._order: Order | None = None
        self._admitted: set[int] = set()
        self._is_sampled = False
        self._starts: Counter[str] = Counter()
        self._pids: dict[str, int] = {}
        self._ready_at_s: dict[str, float] = {}  # by actor, not yet told to the driver
        self._progress: dict[str, dict[int, Progress]] = {}  # by actor
        self._figures: dict[str, Figures] = {}  # by actor, not yet told to the driver
        self._expert_tokens: dict[str, list[list[int]]] = {}  # by actor
        self._heard: dict[str, tuple[float, Stall]] = {}  # by worker: when, and what it said
        self._endings: dict[str, Ending] = {}  # of workers that will end
        self._news = News()
        self._quarantine = Quarantine()

    def is_open(self) -> bool:
        """Whether new shards may start."""
        return self._order is None

    def admit(self, shard: int) -> dict[int, Suspect] | None:
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
        try:
            self._take_start(actor, stage, node, died)
        except JobError as error:
            self.fail(error)  # what is raised here comes to the driver as a text of Ray's
            raise

    def _take_start(self, actor: str, stage: str, node: str, died: InFlight | None) -> None:
        self._figures.pop(actor, None)
        self._heard.pop(actor, None)
        ending = self._endings.pop(actor, KILLED)
        if actor in self._pids:
            has_suspects = died is not None
            self._news.lost.append(WorkerLost(actor, sorted(self._progress.pop(actor, {})), has_suspects))
            lost: dict[str, Any] = {"stage": stage, "actor": actor, "pid": self._pids.pop(actor)}
            if ending.reason is not None:
                lost["reason"] = f"it {ending.what}: {ending.reason}"
            if died is not None:
                lost |= {"rows": len(died.rows), "shard": died.rows[0][0], "row": died.rows[0][1]}
                self._quarantine.blame(died, ending)
            self._news.notes.append(("actor_lost", lost))
            if actor in self._expert_tokens:
                self._news.notes.append(_experts(actor, self._expert_tokens.pop(actor)))
        self._starts[actor] += 1
        if self._starts[actor] > MAX_STARTS:
            raise JobError(f"{stage} was killed {MAX_STARTS} times while it started; is there enough memory?")
        self._news.notes.append(("actor_started", {"stage": stage, "actor": actor, "node": node}))

    def ready(self, actor: str, stage: str, pid: int, node: str, about: Mapping[str, str], started: str = "") -> None:
        """
        about:    more to say of it
        started:  of its process, where the stage will report from now on
        """
        self._starts[actor] = 0
        self._pids[actor] = pid
        self._ready_at_s[actor] = self._clock()
        if started:
            self._heard[actor] = self._clock(), Stall(actor, node, pid, started, 0.0)
        self._news.notes.append(("actor_ready", {"stage": stage, "actor": actor, "pid": pid, "node": node, **about}))

    def report(
        self,
        actor: str,
        progress: Sequence[Progress],
        log: Sequence[str],
        figures: Figures,
        stalled_s: float = 0.0,
        experts: list[list[int]] | None = None,
    ) -> Order | None:
        """A worker's shards in flight, what it logged, its figures, how long its engine is in one step and, where they
        are known, its tokens by layer and expert since it started; returns what it is to do."""
        self._figures[actor] = figures
        if actor in self._heard:
            self._heard[actor] = self._clock(), replace(self._heard[actor][1], seconds=stalled_s)
        self._progress[actor] = {item.shard: item for item in progress}
        self._news.notes += [("log", {"actor": actor, "message": line}) for line in log]
        if experts is not None:
            self._expert_tokens[actor] = experts
        return self._order

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

    def expect_end(self, actor: str, ending: Ending) -> None:
        """A worker is about to end, for a reason that is known."""
        self._endings[actor] = ending

    def forget(self, actor: str) -> None:
        """A worker has gone for good."""
        self._heard.pop(actor, None)
        self._endings.pop(actor, None)

    def fail(self, failure: MorayError) -> None:
        self._news.failure = self._news.failure or failure

    def poll(self, order: Order | None) -> News:
        """The driver's: pass on what is ordered, get the news."""
        self._order = order
        news, self._news = self._news, News(failure=self._news.failure)
        news.admitted = None if order is None else sorted(self._admitted)
        news.figures, self._figures = self._figures, {}
        now_s = self._clock()
        news.ready_s = {actor: now_s - at_s for actor, at_s in self._ready_at_s.items()}
        self._ready_at_s.clear()
        stalls = [replace(said, seconds=said.seconds + now_s - heard_s) for heard_s, said in self._heard.values()]
        news.stalls = [stall for stall in stalls if stall.seconds > SILENT_S]
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
