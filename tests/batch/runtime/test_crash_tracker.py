"""Processes that ended, why, and the rows that were in them."""

import pytest

from moray.batch.run_events import ActorLost, RunEvent
from moray.batch.runtime.crash_tracker import CrashTracker
from moray.batch.worker.quarantine import MAX_CONSECUTIVE_SOLO_CRASHES, RowsInFlight, Suspect, WorkerExit
from moray.engine.errors import JobError


def make() -> tuple[CrashTracker, list[RunEvent]]:
    events: list[RunEvent] = []
    tracker = CrashTracker(events.append)
    tracker.start("a", "worker", None)
    tracker.ready("a", 1)
    assert events == [], "nothing ended before"
    return tracker, events


def test_an_actor_that_starts_again_has_lost_its_process() -> None:
    tracker, events = make()
    assert tracker.was_ready("a")
    tracker.start("a", "worker", None)
    assert events == [ActorLost("worker", "a", 1)]
    assert not tracker.was_ready("a")
    tracker.start("a", "worker", None)
    assert len(events) == 1, "the second process was never ready"


def test_rows_that_were_in_it_are_suspects_until_they_are_cleared() -> None:
    tracker, events = make()
    tracker.start("a", "worker", RowsInFlight([(3, 5), (4, 0)], is_trial=False))
    assert events == [ActorLost("worker", "a", 1, rows=2, shard=3, row=5)]
    assert (tracker.suspects(3), tracker.suspects(4), tracker.suspects(5)) == ({5: Suspect(1)}, {0: Suspect(2)}, {})
    tracker.clear(4, 0)
    assert tracker.suspects(4) == {}


def test_an_expected_exit_explains_the_next_end_only() -> None:
    tracker, events = make()
    failed = WorkerExit.failed("ValueError: no")
    tracker.expect_exit("a", failed)
    tracker.start("a", "worker", RowsInFlight([(3, 5)], is_trial=True))
    assert events == [ActorLost("worker", "a", 1, "it failed: ValueError: no", rows=1, shard=3, row=5)]
    assert tracker.suspects(3) == {5: Suspect(1, 1, failed)}
    tracker.ready("a", 2)
    tracker.start("a", "worker", RowsInFlight([(3, 5)], is_trial=True))
    assert tracker.suspects(3) == {5: Suspect(3, 2)}


def test_a_worker_that_is_gone_for_good_leaves_no_reason_behind() -> None:
    tracker, events = make()
    tracker.expect_exit("a", WorkerExit.hung("no step"))
    tracker.forget("a")
    tracker.start("a", "worker", None)
    assert events == [ActorLost("worker", "a", 1)]


def test_workers_that_end_whatever_is_in_them_end_the_job() -> None:
    tracker, _ = make()
    with pytest.raises(JobError, match="it is the worker, not the rows"):
        for row in range(MAX_CONSECUTIVE_SOLO_CRASHES + 1):
            tracker.ready("a", row)
            tracker.start("a", "worker", RowsInFlight([(0, row)], is_trial=True))
