"""What the monitor actor holds, without the actor."""

import pytest

from batch.faults.quarantine import Ending, InFlight, Suspect
from batch.faults.watchdog import Stall
from batch.forecast.sample import Sample
from batch.ledger import Order, Progress, WorkerLost
from batch.monitor import MAX_STARTS, SILENT_S, MonitorState
from batch.watch.figures import Figures
from engine.errors import CheckpointError, JobError
from engine.metrics import Metrics

FIGURES = Figures(at_s=1.0, rows=3, seqs=4, waiting_seqs=1, free_blocks=3, blocks=8, totals=Metrics())


def begin(monitor: MonitorState, actor: str = "a", pid: int = 1) -> None:
    monitor.start(actor, "worker", "node")
    monitor.ready(actor, "worker", pid, "node", {"device": "cpu"})


def test_an_order_reaches_the_workers_and_closes_the_door() -> None:
    monitor = MonitorState()
    begin(monitor)
    assert monitor.is_open() and monitor.admit(4) == monitor.admit(3) == {}
    assert monitor.report("a", [], [], FIGURES) is None
    assert monitor.poll(None).admitted is None
    assert monitor.poll(Order.DRAIN).admitted == [3, 4]
    assert not monitor.is_open() and monitor.admit(5) is None
    assert monitor.report("a", [], [], FIGURES) is Order.DRAIN
    assert monitor.poll(Order.ABORT).admitted == [3, 4]


def test_news_are_told_once_but_progress_as_it_stands() -> None:
    monitor = MonitorState()
    begin(monitor)
    monitor.report("a", [Progress(0, 1, 2, 3), Progress(1, 0, 0, 0)], ["loaded"], FIGURES)
    begin(monitor, "b", 2)
    monitor.report("b", [Progress(2, 5, 5, 5)], [], FIGURES)
    news = monitor.poll(None)
    assert [name for name, _ in news.notes] == ["actor_started", "actor_ready", "log", "actor_started", "actor_ready"]
    assert sorted(progress.shard for progress in news.progress) == [0, 1, 2]
    monitor.report("a", [Progress(1, 4, 4, 4)], [], FIGURES)
    later = monitor.poll(None)
    assert later.notes == []
    assert news.figures == {"a": FIGURES, "b": FIGURES} and later.figures == {"a": FIGURES}
    assert sorted((progress.shard, progress.rows) for progress in later.progress) == [(1, 4), (2, 5)]


def test_one_sample_is_taken_and_told_once() -> None:
    monitor = MonitorState()
    assert [monitor.claim_sample() for _ in range(3)] == [True, False, False]
    monitor.give_sample(Sample(0, ()))
    assert monitor.poll(None).sample == Sample(0, ())
    assert monitor.poll(None).sample is None
    monitor.give_sample(None, "OSError: gone")
    news = monitor.poll(None)
    assert news.sample is None and news.notes == [("no_forecast", {"reason": "OSError: gone"})]


def test_an_actor_that_starts_again_has_died_with_its_shards() -> None:
    monitor = MonitorState()
    begin(monitor)
    monitor.report("a", [Progress(3, 1, 1, 1), Progress(1, 1, 1, 1)], [], FIGURES)
    monitor.start("a", "worker", "node")
    news = monitor.poll(None)
    assert news.lost == [WorkerLost("a", [1, 3])]
    assert news.progress == [] and news.figures == {}
    assert news.notes[-2] == ("actor_lost", {"stage": "worker", "actor": "a", "pid": 1})


def test_rows_that_were_in_a_dead_worker_are_suspects() -> None:
    monitor = MonitorState()
    begin(monitor)
    monitor.report("a", [Progress(3, 1, 1, 1)], [], FIGURES)
    monitor.start("a", "worker", "node", InFlight([(3, 5), (4, 0)], is_alone=False))
    news = monitor.poll(None)
    assert news.lost == [WorkerLost("a", [3], has_suspects=True)]
    assert ("actor_lost", {"stage": "worker", "actor": "a", "pid": 1, "rows": 2, "shard": 3, "row": 5}) in news.notes
    monitor.ready("a", "worker", 2, "node", {})
    assert (monitor.admit(3), monitor.admit(4), monitor.admit(5)) == ({5: Suspect()}, {0: Suspect()}, {})
    monitor.clear(4, 0)
    monitor.start("a", "worker", "node", InFlight([(3, 5)], is_alone=True))
    assert (monitor.admit(3), monitor.admit(4)) == ({5: Suspect(1)}, {})
    monitor.poll(Order.DRAIN)
    assert monitor.admit(3) is None


def test_expert_loads_are_kept_by_worker_and_told_of_when_it_dies() -> None:
    monitor = MonitorState()
    for actor in ("a", "b"):
        begin(monitor, actor)
        monitor.report(actor, [], [], FIGURES, experts=[[1, 2], [3, 0]])
    monitor.report("a", [], [], FIGURES, experts=[[4, 4], [8, 0]])
    monitor.report("a", [], [], FIGURES)
    begin(monitor, "a", 2)
    told = [fields for name, fields in monitor.poll(None).notes if name == "experts"]
    assert told == [{"actor": "a", "tokens": [[4, 4], [8, 0]]}]
    assert monitor.experts() == [("experts", {"actor": "b", "tokens": [[1, 2], [3, 0]]})]
    monitor.report("a", [], [], FIGURES, experts=[[1, 0], [0, 1]])
    assert [fields["actor"] for _, fields in monitor.experts()] == ["b", "a"]


def test_what_an_actor_says_of_itself_is_told_with_its_being_ready() -> None:
    monitor = MonitorState()
    begin(monitor)
    ready = {"stage": "worker", "actor": "a", "pid": 1, "node": "node", "device": "cpu"}
    assert monitor.poll(None).notes[1] == ("actor_ready", ready)


def test_how_long_ago_an_actor_was_ready_is_told_once() -> None:
    now = [100.0]
    monitor = MonitorState(lambda: now[0])
    begin(monitor)
    now[0] = 100.4
    assert monitor.poll(None).ready_s == {"a": pytest.approx(0.4)}
    assert monitor.poll(None).ready_s == {}


def test_an_actor_that_never_gets_ready_is_given_up() -> None:
    monitor = MonitorState()
    for _ in range(MAX_STARTS):
        monitor.start("a", "worker", "node")
    with pytest.raises(JobError, match="worker was killed 3 times while it started"):
        monitor.start("a", "worker", "node")
    assert isinstance(monitor.poll(None).failure, JobError), "the driver is told"
    for _ in range(3 * MAX_STARTS):
        begin(monitor, "b")


def test_the_first_failure_is_the_one_that_counts() -> None:
    monitor = MonitorState()
    monitor.fail(CheckpointError("no weights"))
    monitor.fail(JobError("and so on"))
    for _ in range(2):
        assert str(monitor.poll(None).failure) == "no weights"


def test_a_worker_that_is_silent_or_stuck_in_a_step_stalls() -> None:
    now = [100.0]
    monitor = MonitorState(lambda: now[0])
    monitor.start("a", "worker", "node")
    monitor.ready("a", "worker", 7, "node", {}, "12345")
    begin(monitor, "p", 8)  # of a stage that does not report
    monitor.report("a", [], [], FIGURES, 3.0)
    now[0] += SILENT_S - 3.5
    assert monitor.poll(None).stalls == []
    now[0] += 1.0
    assert monitor.poll(None).stalls == [Stall("a", "node", 7, "12345", SILENT_S + 0.5)]
    monitor.report("a", [], [], FIGURES, 0.0)
    assert monitor.poll(None).stalls == []
    now[0] += 60.0
    assert [stall.seconds for stall in monitor.poll(None).stalls] == [60.0]
    monitor.forget("a")
    assert monitor.poll(None).stalls == []


def test_an_end_that_is_expected_has_its_reason() -> None:
    monitor = MonitorState()
    begin(monitor)
    monitor.expect_end("a", Ending.failed("ValueError: no"))
    monitor.start("a", "worker", "node", InFlight([(3, 5)], is_alone=True))
    (lost,) = [fields for name, fields in monitor.poll(None).notes if name == "actor_lost"]
    assert lost["reason"] == "it failed: ValueError: no"
    assert monitor.admit(3) == {5: Suspect(1, Ending.failed("ValueError: no"))}
    begin(monitor)
    monitor.start("a", "worker", "node", InFlight([(3, 5)], is_alone=True))
    assert monitor.admit(3) == {5: Suspect(2)}, "the next end is another one"
