"""StartWatch: says what a job that does not begin waits for, and ends it when it has waited too long."""

from collections.abc import Callable, Mapping, Sequence

from batch.placement.nodes import Node, Placement, explain_absence
from engine.errors import JobError

NOTE_S = 20.0  # a stage that is not placed by then is worth a line


class StartWatch:
    """
    placements:  stage -> what one of its actors asks for
    timeout_s:   in which each stage must have an actor that is ready; None = however long it takes
    nodes:       those that the cluster has now
    """

    def __init__(
        self, placements: Mapping[str, Placement], timeout_s: float | None, nodes: Callable[[], Sequence[Node]]
    ) -> None:
        self._placements = placements
        self._timeout_s = timeout_s
        self._nodes = nodes
        self._started: set[str] = set()
        self._ready: set[str] = set()
        self._noted = False

    def take(self, note: str, fields: Mapping[str, str | int]) -> None:
        """A note of the monitor's."""
        if note == "actor_started":
            self._started.add(str(fields["stage"]))
        elif note == "actor_ready":
            self._ready.add(str(fields["stage"]))

    def check(self, elapsed_s: float) -> str | None:
        """A line about what the job waits for, once. Raises JobError with the reason when the time is up."""
        late = [stage for stage in self._placements if stage not in self._ready]
        if late and self._timeout_s is not None and elapsed_s > self._timeout_s:
            stage, reason = self._explain(late)
            limit = f"within {self._timeout_s:g} s (workers.start_timeout_s)"
            raise JobError(f"no actor of {stage} was ready {limit}: {reason}")
        homeless = [stage for stage in late if stage not in self._started]
        if not homeless or self._noted or elapsed_s < NOTE_S:
            return None
        self._noted = True
        stage, reason = self._explain(homeless)
        return f"Waiting for a place for {stage}: {reason}"

    def _explain(self, late: Sequence[str]) -> tuple[str, str]:
        """The stage that is furthest from being ready, and why."""
        nodes = self._nodes()
        places = {stage: any(map(self._placements[stage].fits, nodes)) for stage in late}
        stage = min(late, key=lambda one: (one in self._started, places[one]))
        if stage in self._started:
            return stage, "it was started and is still getting ready, a worker by loading the model"
        return stage, explain_absence(self._placements[stage], nodes)
