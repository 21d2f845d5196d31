from moray.batch.runtime.hang_detector import StalledWorker
from moray.batch.runtime.heartbeats import STALL_AFTER_S, Heartbeats


def test_a_worker_that_is_silent_or_stuck_in_a_step_stalls() -> None:
    now = [100.0]
    heartbeats = Heartbeats(lambda: now[0])
    heartbeats.begin("a", "node", 7, "12345")
    heartbeats.beat("a", 3.0)
    now[0] += STALL_AFTER_S - 3.5
    assert heartbeats.stalls() == []
    now[0] += 1.0
    assert heartbeats.stalls() == [StalledWorker("a", "node", 7, "12345", STALL_AFTER_S + 0.5)]
    heartbeats.beat("a", 0.0)
    assert heartbeats.stalls() == []
    now[0] += 60.0
    assert [stall.seconds for stall in heartbeats.stalls()] == [60.0], "it may be gone for good"
    heartbeats.forget("a")
    assert heartbeats.stalls() == []


def test_a_report_of_an_unknown_worker_is_no_heartbeat() -> None:
    heartbeats = Heartbeats(lambda: 0.0)
    heartbeats.beat("a", 1e9)
    assert heartbeats.stalls() == []
