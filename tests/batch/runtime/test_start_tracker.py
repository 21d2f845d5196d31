"""Starts of actors that fail, and the stage that cannot be started."""

import pytest

from moray.batch.run_events import ActorReady, ActorStarted, RunEvent, StartFailed
from moray.batch.runtime.start_tracker import ACTOR_LOST_S, KILLED_REASON, MAX_START_S, MAX_STARTS, StartTracker
from moray.engine.errors import JobError


class Starts:
    """A tracker with a clock of its own, and its events."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events: list[RunEvent] = []
        self.tracker = StartTracker(self.events.append, lambda: self.now_s)

    def begin(self, actor: str, stage: str = "worker") -> None:
        self.tracker.begin(actor, stage, "node")

    def ready(self, actor: str, stage: str = "worker") -> None:
        self.begin(actor, stage)
        self.tracker.ready(ActorReady(stage, actor, 1, "node"))

    def fail(self, actor: str, reason: str = "no driver", stage: str = "worker") -> float:
        self.begin(actor, stage)
        return self.tracker.fail(actor, stage, "node", reason)


def test_a_start_that_succeeds() -> None:
    starts = Starts()
    starts.ready("a")
    assert starts.events == [ActorStarted("worker", "a", "node"), ActorReady("worker", "a", 1, "node")]
    starts.now_s = 0.4
    assert starts.tracker.pop_ready_s() == {"a": 0.4}
    assert starts.tracker.pop_ready_s() == {}, "only once"


def test_an_actor_that_never_gets_ready_is_given_up() -> None:
    starts = Starts()
    for _ in range(MAX_STARTS):
        starts.begin("a")
    with pytest.raises(JobError, match="worker could not be started 3 times in a row, and none is ready: it was kill"):
        starts.begin("a")
    for _ in range(3 * MAX_STARTS):
        starts.ready("b")


def test_pauses_get_longer_until_the_actor_is_ready() -> None:
    starts = Starts()
    starts.ready("good")
    assert [starts.fail("bad") for _ in range(8)] == [2, 4, 8, 16, 32, 60, 60, 60], "another one is ready"
    starts.ready("bad")
    assert starts.fail("bad") == 2, "it was ready in between"
    failed = [event for event in starts.events if isinstance(event, StartFailed)]
    assert [event.failed_in_a_row for event in failed] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert KILLED_REASON not in {event.reason for event in failed}, "not that it was killed as well"


def test_a_stage_is_hopeless_when_all_its_actors_have_failed_often_enough() -> None:
    starts = Starts()
    starts.ready("c", "commit")
    starts.begin("b")
    for _ in range(MAX_STARTS + 1):
        starts.fail("a", "no memory")  # b may yet be ready
    starts.tracker.fail("b", "worker", "node", "no driver")
    starts.fail("b", "no driver")
    starts.begin("b")
    with pytest.raises(JobError) as failure:
        starts.tracker.fail("b", "worker", "node", "no driver")
    assert str(failure.value).endswith("and none is ready: no driver; no memory")


def test_an_actor_that_starts_for_ever_is_not_waited_for() -> None:
    starts = Starts()
    starts.begin("gone")
    for _ in range(MAX_STARTS):
        starts.fail("a")
    starts.now_s = MAX_START_S + 1
    with pytest.raises(JobError, match="none is ready: no driver"):
        starts.fail("a")


@pytest.mark.parametrize("stage", ["prepare", "worker", "commit"])
def test_an_actor_that_was_ready_and_went_away_with_its_node_does_not_keep_a_stage_alive(stage: str) -> None:
    starts = Starts()
    starts.ready("lost", stage)
    for _ in range(20):  # alive, and so more failures are no reason to end the job
        starts.now_s += ACTOR_LOST_S - 1
        starts.tracker.beat("lost")
        starts.fail("a", stage=stage)
    starts.now_s += ACTOR_LOST_S - 1
    starts.fail("a", stage=stage)
    starts.now_s += 1
    with pytest.raises(JobError, match=f"^{stage} could not be started .* none is ready: no driver$"):
        starts.fail("a", stage=stage)


def test_a_late_heartbeat_of_an_old_process_makes_no_actor_ready() -> None:
    starts = Starts()
    starts.tracker.beat("unknown")
    starts.begin("a")
    starts.tracker.beat("a")
    for _ in range(MAX_STARTS - 1):
        starts.begin("a")
    with pytest.raises(JobError, match="none is ready"):
        starts.begin("a")
