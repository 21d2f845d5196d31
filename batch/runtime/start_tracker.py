"""StartTracker: follows the starts of a job's actors, and finds out when a stage cannot be started. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field

from moray.batch.run_events import ActorReady, ActorStarted, RunEvent, StartFailed
from moray.engine.errors import JobError

ACTOR_LOST_S = 60.0  # seconds without a heartbeat after which an actor no longer counts as ready
MAX_START_S = 1800.0  # seconds of starting after which an actor is ignored: it may be gone for good
MAX_STARTS = 3  # failed starts in a row of every actor of a stage, none of which is ready, that end the job
RETRY_PAUSE_S, MAX_RETRY_PAUSE_S = 2.0, 60.0  # seconds before the next start, doubled after each failed one
KILLED_REASON = "it was killed; is there enough memory?"  # the reason where the actor could not report one


@dataclass
class _Actor:
    """Holds the state of an actor.

    began_s:       when its process began to start
    seen_s:        when it last sent a heartbeat; None = it is not ready
    failures:      why its starts failed, since it was last ready
    has_reported:  True where it reported why this start failed
    """

    stage: str
    began_s: float
    seen_s: float | None = None
    failures: list[str] = field(default_factory=list)
    has_reported: bool = False


class StartTracker:
    """Counts the failed starts of each actor.

    One bad node, or memory that an earlier process has not released yet, is no reason to end the job. It ends when
    every actor of a stage has failed MAX_STARTS times in a row and no actor of the stage is ready.

    emit:   called with each event of the run that follows
    clock:  seconds, monotonic
    """

    def __init__(self, emit: Callable[[RunEvent], None], clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._actors: dict[str, _Actor] = {}
        self._ready_at_s: dict[str, float] = {}  # by actor, until pop_ready_s returns it

    def begin(self, actor: str, stage: str, node: str) -> None:
        """Record that a process of an actor begins to start. One that was starting before was killed.

        Raises JobError where no actor of the stage can be started: Ray would try forever.
        """
        failures: list[str] = []
        if (before := self._actors.get(actor)) is not None and before.seen_s is None:
            if not before.has_reported:
                self._count_failure(actor, stage, node, KILLED_REASON)
            failures = before.failures
        self._actors[actor] = _Actor(stage, self._clock(), failures=failures)
        self._emit(ActorStarted(stage, actor, node))

    def fail(self, actor: str, stage: str, node: str, reason: str) -> float:
        """Record that an actor could not start and is about to exit.

        Returns how many seconds it must wait before it exits. Raises JobError where no actor of the stage can be
        started.
        """
        num_failures = self._count_failure(actor, stage, node, reason)
        self._actors[actor].has_reported = True
        return min(MAX_RETRY_PAUSE_S, RETRY_PAUSE_S * 2.0 ** (num_failures - 1))

    def ready(self, event: ActorReady) -> None:
        """Record that an actor is ready."""
        now_s = self._clock()
        self._actors[event.actor] = _Actor(event.stage, now_s, seen_s=now_s)
        self._ready_at_s[event.actor] = now_s
        self._emit(event)

    def beat(self, actor: str) -> None:
        """Record a heartbeat of an actor that is ready."""
        state = self._actors.get(actor)
        if state is not None and state.seen_s is not None:
            state.seen_s = self._clock()

    def pop_ready_s(self) -> dict[str, float]:
        """Return for how many seconds each actor has been ready that became so since the last call."""
        now_s = self._clock()
        ready_at_s, self._ready_at_s = self._ready_at_s, {}
        return {actor: now_s - at_s for actor, at_s in ready_at_s.items()}

    def _count_failure(self, actor: str, stage: str, node: str, reason: str) -> int:
        """Record a failed start and return the number of them in a row; raise JobError where the stage is hopeless."""
        state = self._actors.setdefault(actor, _Actor(stage, self._clock()))
        state.failures.append(reason)
        self._emit(StartFailed(stage, actor, node, reason, failed_in_a_row=len(state.failures)))
        others = (other for other in self._actors.values() if other.stage == stage and other is not state)
        candidates = [state, *(other for other in others if self._may_work(other))]
        if all(one.seen_s is None and len(one.failures) >= MAX_STARTS for one in candidates):
            reasons = dict.fromkeys(text for one in candidates for text in one.failures[-MAX_STARTS:])
            raise JobError(
                f"{stage} could not be started {MAX_STARTS} times in a row, and none is ready: {'; '.join(reasons)}"
            )
        return len(state.failures)

    def _may_work(self, actor: _Actor) -> bool:
        """Return whether an actor is ready, or may become so: one on a node that was lost says nothing any more."""
        if actor.seen_s is not None:
            return self._clock() - actor.seen_s < ACTOR_LOST_S
        return self._clock() - actor.began_s < MAX_START_S
