"""Workers: the job's workers as the driver sees them, how busy they are and how long they held their places. Pure."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batch.watch.figures import Figures
from engine.metrics import Metrics

STAGE = "worker"
SILENT_S = 15.0  # a worker tells of itself every second; one that has not for so long is not counted
WINDOW_S = 10.0  # how busy they are is over this long


@dataclass
class _Place:
    """One process of a worker, from its start to its end.

    heard_s:  when it last told of itself, by the driver's clock; None = it is still starting
    recent:   its figures over WINDOW_S
    told:     its figures when they were last written down
    """

    node: str
    started_s: float
    heard_s: float | None = None
    first: Figures | None = None
    recent: deque[Figures] = field(default_factory=deque)
    told: Figures | None = None

    @property
    def last(self) -> Figures | None:
        return self.recent[-1] if self.recent else None


class Workers:
    """Times are the driver's, in seconds.

    worker_s, card_s:  what earlier runs of the job held
    gpus_each:         of a worker, once it is known
    """

    def __init__(self, worker_s: float = 0.0, card_s: float = 0.0) -> None:
        self.gpus_each = 0.0
        self._worker_s, self._card_s = worker_s, card_s
        self._places: dict[str, _Place] = {}  # by actor
        self._ended_s = 0.0  # held by processes that ended
        self._ready_since_s: float | None = None  # one or more have been ready
        self._ready_until_s = 0.0  # by those that ended since
        self._ready_spans: list[tuple[float, float]] = []  # that are over
        self._gone = Metrics()  # totals of processes that ended
        self._busy_s = self._span_s = self._used_s = 0.0  # over the whole run: engine busy, watched, x KV cache in use

    def take(self, note: str, fields: Mapping[str, Any], now_s: float) -> None:
        """A note of the monitor's about an actor."""
        if fields.get("stage") != STAGE:
            return
        actor = str(fields["actor"])
        if note == "actor_started":
            self._end(actor, now_s)
            self._places[actor] = _Place(str(fields["node"]), now_s)
        elif note == "actor_ready" and actor in self._places:
            self._places[actor].heard_s = now_s
            self._ready_since_s = now_s if self._ready_since_s is None else min(now_s, self._ready_since_s)
        elif note == "actor_lost":
            self._end(actor, now_s)

    def hear(self, actor: str, figures: Figures, now_s: float) -> None:
        """What a worker tells of itself; from one that never started it is left over from a process that died."""
        place = self._places.get(actor)
        if place is None or place.heard_s is None:
            return
        before, place.heard_s = place.last, now_s
        place.first = place.first or figures
        if before is not None:
            seconds = figures.at_s - before.at_s
            self._span_s += seconds
            self._busy_s += seconds * _busy(before, figures)
            self._used_s += seconds * figures.used_blocks / max(1, figures.blocks)
        place.recent.append(figures)
        while len(place.recent) > 2 and place.recent[1].at_s <= figures.at_s - WINDOW_S:
            place.recent.popleft()

    def end(self, now_s: float) -> None:
        """The run is over: nobody holds a place any more."""
        for actor in list(self._places):
            self._end(actor, now_s)

    def num_alive(self, now_s: float) -> int:
        """Those that hold the model and were heard of."""
        return sum(place.heard_s is not None and _is_held(place, now_s) for place in self._places.values())

    @property
    def num_starting(self) -> int:
        return sum(place.heard_s is None for place in self._places.values())

    def busy(self, now_s: float) -> float:
        """Share of the time in which the engines were in a step: lately; over the whole run once that is over."""
        shares = [_busy(place.recent[0], place.recent[-1]) for _, place in self._heard(now_s)]
        if shares:
            return sum(shares) / len(shares)
        return self._busy_s / self._span_s if self._span_s else 0.0

    def kv_use(self, now_s: float) -> float:
        """Share of the KV caches in use: now; over the whole run, in the mean, once that is over."""
        last = [place.recent[-1] for _, place in self._heard(now_s)]
        if last:
            return sum(one.used_blocks for one in last) / max(1, sum(one.blocks for one in last))
        return self._used_s / self._span_s if self._span_s else 0.0

    def latest(self, now_s: float) -> list[Figures]:
        """Of each worker that is alive."""
        return [place.recent[-1] for _, place in self._heard(now_s)]

    def worker_s(self, now_s: float) -> float:
        """How long workers held their places, all together, over all runs: from their start until they were last heard
        of."""
        return self._worker_s + self._held_s(now_s)

    def ready_s(self, now_s: float) -> float:
        """How long a worker was there and could work, one or several, in this run up to now."""
        spans = list(self._ready_spans)
        if self._ready_since_s is not None:
            held = [_held_until(place, now_s) for place in self._places.values() if place.heard_s is not None]
            spans.append((self._ready_since_s, max([self._ready_until_s, *held])))
        return sum(max(0.0, min(until, now_s) - since) for since, until in spans)

    def card_s(self, now_s: float) -> float:
        """The same of GPUs."""
        return self._card_s + self.gpus_each * self._held_s(now_s)

    @property
    def totals(self) -> Metrics:
        """Of all engines of this run, those of workers that died included."""
        last = [place.last.totals for place in self._places.values() if place.last is not None]
        return _sum(self._gone, *last)

    def describe(self, now_s: float) -> list[dict[str, Any]]:
        """One entry a living worker for the event `figures`; busy is since the last time that this was asked."""
        return [_describe(actor, place) for actor, place in self._heard(now_s)]

    def _heard(self, now_s: float) -> Iterator[tuple[str, _Place]]:
        """Those that have told of themselves."""
        for actor, place in self._places.items():
            if place.recent and _is_held(place, now_s):
                yield actor, place

    def _held_s(self, now_s: float) -> float:
        return self._ended_s + sum(_held_until(place, now_s) - place.started_s for place in self._places.values())

    def _end(self, actor: str, now_s: float) -> None:
        place = self._places.pop(actor, None)
        if place is not None:
            until = _held_until(place, now_s)
            self._ended_s += until - place.started_s
            if place.heard_s is not None:
                self._ready_until_s = max(self._ready_until_s, until)
                self._close_span()
            if place.last is not None:
                self._gone = _sum(self._gone, place.last.totals)

    def _close_span(self) -> None:
        """Where no worker is ready any more."""
        if self._ready_since_s is not None and all(place.heard_s is None for place in self._places.values()):
            self._ready_spans.append((self._ready_since_s, self._ready_until_s))
            self._ready_since_s = None


def _is_held(place: _Place, now_s: float) -> bool:
    return place.heard_s is None or now_s - place.heard_s <= SILENT_S


def _held_until(place: _Place, now_s: float) -> float:
    """A worker that Ray took away says nothing about it."""
    return now_s if place.heard_s is None or _is_held(place, now_s) else place.heard_s


def _busy(before: Figures, after: Figures) -> float:
    seconds = after.at_s - before.at_s
    if seconds <= 0:
        return 0.0
    return min(1.0, max(0.0, (after.totals.busy_s - before.totals.busy_s) / seconds))


def _sum(*all_totals: Metrics) -> Metrics:
    names = asdict(Metrics())
    return Metrics(**{name: sum(getattr(totals, name) for totals in all_totals) for name in names})


def _describe(actor: str, place: _Place) -> dict[str, Any]:
    last, told = place.recent[-1], place.told or place.first
    assert told is not None, "a place with figures has first ones"
    place.told = last
    return {
        "actor": actor,
        "node": place.node,
        "seqs": last.seqs,
        "waiting_seqs": last.waiting_seqs,
        "busy": round(_busy(told, last), 3),
        "kv_use": round(last.used_blocks / max(1, last.blocks), 3),
        "cached_tokens": last.totals.cached_tokens,
        "computed_tokens": last.totals.computed_tokens,
        "preemptions": last.totals.preemptions,
    }
