"""What the monitor puts together for the driver, without the actor. Its parts have tests of their own."""

import pytest

from moray.batch.forecast.sample import PromptSample
from moray.batch.ledger import Command, Progress, WorkerLost
from moray.batch.run_events import ActorLost, ActorReady, ActorStarted, ExpertTokens, LogLine, NoForecast
from moray.batch.runtime.heartbeats import STALL_AFTER_S
from moray.batch.runtime.monitor import MonitorActor
from moray.batch.runtime.start_tracker import ACTOR_LOST_S, MAX_STARTS
from moray.batch.runtime.worker_reports import WorkerReport
from moray.batch.worker.quarantine import RowsInFlight, Suspect
from moray.batch.worker.stats import WorkerStats
from moray.engine.errors import CheckpointError, JobError
from moray.engine.metrics import Metrics

STATS = WorkerStats(
    1.0,
    rows=3,
    seqs=4,
    waiting_seqs=1,
    free_blocks=3,
    blocks=8,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    totals=Metrics(),
)
IDLE = WorkerReport([], [], STATS)


def begin(monitor: MonitorActor, actor: str = "a", pid: int = 1, *, started: str = "12345") -> None:
    monitor.start(actor, "worker", "node")
    monitor.ready(ActorReady("worker", actor, pid, "node", device="cpu"), started)


def test_a_command_reaches_the_workers_and_stops_admission() -> None:
    monitor = MonitorActor()
    begin(monitor)
    assert monitor.is_open() and monitor.admit(4) == monitor.admit(3) == {}
    assert monitor.report("a", IDLE) is None
    assert monitor.poll(None).admitted is None
    assert monitor.poll(Command.DRAIN).admitted == [3, 4]
    assert not monitor.is_open() and monitor.admit(5) is None
    assert monitor.report("a", IDLE) is Command.DRAIN
    assert monitor.poll(Command.ABORT).admitted == [3, 4]


def test_events_are_returned_once_and_in_order() -> None:
    monitor = MonitorActor()
    begin(monitor)
    monitor.report("a", WorkerReport([Progress(0, 1, 2, 3)], ["loaded", "ready"], STATS))
    update = monitor.poll(None)
    assert update.events == [
        ActorStarted("worker", "a", "node"),
        ActorReady("worker", "a", 1, "node", device="cpu"),
        LogLine("a", "loaded"),
        LogLine("a", "ready"),
    ]
    assert (update.progress, update.stats, update.ready_s.keys()) == ([Progress(0, 1, 2, 3)], {"a": STATS}, {"a"})
    later = monitor.poll(None)
    assert (later.events, later.stats, later.ready_s, later.progress) == ([], {}, {}, [Progress(0, 1, 2, 3)])


def test_one_sample_is_collected_and_returned_once() -> None:
    monitor = MonitorActor()
    assert [monitor.claim_sample() for _ in range(3)] == [True, False, False]
    monitor.submit_sample(PromptSample(0, ()))
    assert monitor.poll(None).sample == PromptSample(0, ())
    assert monitor.poll(None).sample is None
    monitor.submit_sample(None, "OSError: gone")
    update = monitor.poll(None)
    assert update.sample is None and update.events == [NoForecast("OSError: gone")]


def test_an_actor_that_starts_again_has_died_with_its_shards() -> None:
    monitor = MonitorActor()
    begin(monitor)
    shards = [Progress(3, 1, 1, 1), Progress(1, 1, 1, 1)]
    monitor.report("a", WorkerReport(shards, [], STATS, expert_tokens=[[4, 4], [8, 0]]))
    monitor.poll(None)
    monitor.start("a", "worker", "other", RowsInFlight([(3, 5)], is_trial=True))
    update = monitor.poll(None)
    assert update.lost == [WorkerLost("a", [1, 3], has_suspects=True)]
    assert (update.progress, update.stats, monitor.expert_tokens()) == ([], {}, [])
    assert update.events == [
        ActorLost("worker", "a", 1, rows=1, shard=3, row=5),
        ExpertTokens("a", [[4, 4], [8, 0]]),
        ActorStarted("worker", "a", "other"),
    ]
    assert monitor.admit(3) == {5: Suspect(1, 1)}
    monitor.clear(3, 5)
    assert monitor.admit(3) == {}
    monitor.ready(ActorReady("worker", "a", 2, "other"))
    monitor.start("a", "worker", "node")
    assert monitor.poll(None).lost == [WorkerLost("a", [], has_suspects=False)], "nothing is known of its rows"


def test_the_first_failure_is_the_one_that_counts() -> None:
    monitor = MonitorActor()
    monitor.fail(CheckpointError("no weights"))
    monitor.fail(JobError("and so on"))
    for _ in range(2):
        assert str(monitor.poll(None).failure) == "no weights"


def test_a_stage_that_cannot_be_started_fails_the_job() -> None:
    for is_reported in (False, True):
        monitor = MonitorActor()
        with pytest.raises(JobError):
            for _ in range(MAX_STARTS + 1):
                monitor.start("a", "worker", "node")
                if is_reported:
                    monitor.report_failed_start("a", "worker", "node", "no driver")
        assert "worker could not be started" in str(monitor.poll(None).failure), "the driver gets it"


def test_actors_that_send_no_reports_send_heartbeats() -> None:
    now = [0.0]
    monitor = MonitorActor(lambda: now[0])
    monitor.ready(ActorReady("commit", "c", 1, "node"))

    def fail() -> None:
        for _ in range(MAX_STARTS):
            monitor.start("a", "commit", "node")
            monitor.report_failed_start("a", "commit", "node", "no driver")

    fail()
    now[0] = ACTOR_LOST_S - 1
    monitor.beat("c")
    now[0] += ACTOR_LOST_S - 1
    fail()
    assert monitor.poll(None).stalls == [], "a silence of theirs is no hang"
    now[0] += 1
    with pytest.raises(JobError, match="commit could not be started"):
        fail()


def test_a_worker_that_stalls_is_returned_until_it_is_forgotten() -> None:
    now = [0.0]
    monitor = MonitorActor(lambda: now[0])
    begin(monitor)
    now[0] = STALL_AFTER_S + 1
    assert [stall.actor for stall in monitor.poll(None).stalls] == ["a"]
    monitor.report("a", IDLE)
    assert monitor.poll(None).stalls == []
    now[0] *= 2
    monitor.forget("a")
    assert monitor.poll(None).stalls == []
