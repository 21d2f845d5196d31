"""StartupTimeout: reports what a job that does not start waits for, and ends it after a time limit."""

from collections.abc import Callable, Mapping, Sequence

from moray.batch.plan.nodes import Node, Placement, explain_unschedulable
from moray.batch.run_events import ActorReady, ActorStarted, RunEvent, StartFailed
from moray.engine.errors import JobError

NOTE_S = 20.0  # seconds after which a stage without an actor on any node is reported


class StartupTimeout:
    """Checks that every stage of a job has an actor that is ready in time.

    placements:  stage -> the resources that one of its actors needs
    timeout_s:   seconds in which each stage must have an actor that is ready; None = no limit
    nodes:       returns the nodes that the cluster has now
    began_s:     when Ray was up and the stages were requested, in seconds since the job began
    is_own:      True where nothing but the job runs on the nodes
    """

    def __init__(
        self,
        placements: Mapping[str, Placement],
        timeout_s: float | None,
        nodes: Callable[[], Sequence[Node]],
        *,
        began_s: float = 0.0,
        is_own: bool = False,
    ) -> None:
        self._placements = placements
        self._timeout_s = timeout_s
        self._nodes = nodes
        self._began_s = began_s
        self._is_own = is_own
        self._started: set[str] = set()
        self._ready: set[str] = set()
        self._has_noted = False
        self._failures: dict[str, str] = {}  # by stage: why an actor's last start failed

    def on_event(self, event: RunEvent) -> None:
        """Record an event of the run where it is about the start of an actor; other events are ignored."""
        match event:
            case ActorStarted(stage):
                self._started.add(stage)
            case ActorReady(stage):
                self._ready.add(stage)
            case StartFailed(stage, reason=reason):
                self._failures[stage] = reason

    def check(self, elapsed_s: float) -> str | None:
        """Return a line about what the job waits for, once; None otherwise.

        elapsed_s:  seconds since the job began

        Raises JobError with the reason when the time is up.
        """
        not_ready = [stage for stage in self._placements if stage not in self._ready]
        if not_ready and self._timeout_s is not None and elapsed_s > self._timeout_s:
            stage, reason = self._explain(not_ready)
            limit = f"within {self._timeout_s:g} s (workers.start_timeout_s)"
            raise JobError(f"no actor of {stage} was ready {limit}: {reason}")
        unscheduled = [stage for stage in not_ready if stage not in self._started]
        if not unscheduled or self._has_noted or elapsed_s - self._began_s < NOTE_S:
            return None
        self._has_noted = True
        stage, reason = self._explain(unscheduled)
        return f"Waiting for a place for {stage}: {reason}"

    def _explain(self, not_ready: Sequence[str]) -> tuple[str, str]:
        """Return the stage that is furthest from being ready, and why."""
        nodes = self._nodes()
        has_node = {stage: any(map(self._placements[stage].fits, nodes)) for stage in not_ready}
        stage = min(not_ready, key=lambda name: (name in self._started, has_node[name]))
        if stage in self._failures:
            return stage, f"its last start failed: {self._failures[stage]}"
        if stage in self._started:
            return stage, "it was started and is still getting ready, a worker by loading the model"
        return stage, explain_unschedulable(self._placements[stage], nodes, is_own=self._is_own)
