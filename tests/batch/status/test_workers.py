"""What the driver derives from the reports of workers, with clocks of the test's own."""

from dataclasses import replace

import pytest

from moray.batch.run_events import ActorLost, ActorReady, ActorStarted
from moray.batch.status.workers import HEARTBEAT_TIMEOUT_S, Workers
from moray.batch.worker.stats import WorkerStats
from moray.engine.metrics import Metrics


def begin(workers: Workers, actor: str, now_s: float, ready_s: float | None = None) -> None:
    workers.on_event(ActorStarted("worker", actor, f"node-{actor}"), now_s)
    if ready_s is not None:
        workers.on_event(ActorReady("worker", actor, 1, f"node-{actor}"), ready_s)


def make_stats(at_s: float, busy_s: float = 0.0, free_blocks: int = 10, tokens: int = 0) -> WorkerStats:
    totals = Metrics(generated_tokens=tokens, busy_s=busy_s)
    return WorkerStats(
        at_s,
        rows=2,
        seqs=3,
        waiting_seqs=1,
        free_blocks=free_blocks,
        blocks=10,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        totals=totals,
    )


def test_workers_start_live_and_fall_silent() -> None:
    workers = Workers()
    workers.on_event(ActorStarted("commit", "c", "n"), 0.0)
    begin(workers, "a", 0.0)
    assert (workers.num_alive(5.0), workers.num_starting) == (0, 1)
    begin(workers, "b", 0.0, ready_s=6.0)
    workers.update_stats("b", make_stats(1000.0), 7.0)
    assert (workers.num_alive(7.0), workers.num_starting) == (1, 1)
    assert (workers.num_alive(7.0 + HEARTBEAT_TIMEOUT_S), workers.num_alive(7.1 + HEARTBEAT_TIMEOUT_S)) == (1, 0)
    workers.update_stats("b", make_stats(1030.0), 40.0)
    assert workers.num_alive(40.0) == 1


def test_busy_and_kv_use_are_of_now_and_in_the_end_of_the_whole_run() -> None:
    workers = Workers()
    assert (workers.busy(0.0), workers.kv_use(0.0)) == (0.0, 0.0)
    begin(workers, "a", 0.0, ready_s=0.0)
    begin(workers, "b", 0.0, ready_s=0.0)
    for second in range(101):  # a: idle, then busy; b: half busy
        workers.update_stats(
            "a", make_stats(500.0 + second, max(0.0, second - 50), free_blocks=0 if second > 50 else 10), second
        )
        workers.update_stats("b", make_stats(900.0 + second, second / 2), second)
    assert workers.busy(100.0) == pytest.approx(0.75)
    assert workers.kv_use(100.0) == 0.5
    workers.end(100.0)
    assert workers.busy(100.0) == pytest.approx(0.5)
    assert workers.kv_use(100.0) == pytest.approx(0.25)
    assert workers.num_alive(100.0) == 0


def test_a_step_that_is_reported_late_does_not_make_a_worker_more_than_busy() -> None:
    workers = Workers()
    begin(workers, "a", 0.0, ready_s=0.0)
    for at_s, busy_s in ((0.0, 0.0), (1.0, 0.9), (2.0, 0.5), (3.0, 4.0)):
        workers.update_stats("a", make_stats(at_s, busy_s), at_s)
        assert 0.0 <= workers.busy(at_s) <= 1.0


def test_places_are_held_from_the_start_to_the_last_sign_of_life() -> None:
    workers = Workers(worker_s=100.0, gpu_s=200.0)
    workers.gpus_each = 2.0
    begin(workers, "a", 10.0, ready_s=20.0)
    workers.update_stats("a", make_stats(0.0), 30.0)
    assert (workers.worker_s(31.0), workers.gpu_s(31.0)) == (121.0, 242.0)
    assert workers.worker_s(500.0) == 120.0  # Ray released it and did not announce it
    begin(workers, "a", 600.0)  # on another machine; it loads the model
    assert workers.worker_s(700.0) == 220.0
    workers.end(700.0)
    assert (workers.worker_s(900.0), workers.gpu_s(900.0)) == (220.0, 440.0)


def test_a_worker_is_ready_from_the_first_to_the_last_without_the_time_between() -> None:
    workers = Workers(worker_s=100.0)
    begin(workers, "a", 0.0)
    assert workers.ready_s(5.0) == 0.0
    begin(workers, "a", 0.0, ready_s=10.0)
    begin(workers, "b", 0.0, ready_s=12.0)
    assert workers.ready_s(15.0) == 5.0
    workers.on_event(ActorLost("worker", "a", 1), 20.0)
    begin(workers, "a", 20.0)  # it loads the model again; b works
    workers.update_stats("b", make_stats(0.0), 25.0)
    assert workers.ready_s(30.0) == 20.0
    workers.on_event(ActorLost("worker", "b", 1), 30.0)
    begin(workers, "a", 40.0, ready_s=50.0)
    workers.update_stats("a", make_stats(0.0), 60.0)
    assert workers.ready_s(60.0) == 30.0
    workers.end(70.0)
    assert [workers.ready_s(at_s) for at_s in (70.0, 90.0, 65.0, 35.0, 25.0)] == [40.0, 40.0, 35.0, 20.0, 15.0]


def test_a_lost_machine_is_ready_until_its_last_heartbeat() -> None:
    workers = Workers()
    begin(workers, "a", 0.0, ready_s=10.0)
    workers.update_stats("a", make_stats(0.0), 20.0)
    assert workers.ready_s(20.0 + HEARTBEAT_TIMEOUT_S) == 10.0 + HEARTBEAT_TIMEOUT_S
    assert workers.ready_s(500.0) == 10.0
    workers.end(500.0)
    assert workers.ready_s(500.0) == 10.0


def test_totals_count_what_died_workers_did() -> None:
    workers = Workers()
    begin(workers, "a", 0.0, ready_s=0.0)
    begin(workers, "b", 0.0, ready_s=0.0)
    workers.update_stats("a", make_stats(1.0, tokens=100), 1.0)
    workers.update_stats("b", make_stats(1.0, tokens=10), 1.0)
    workers.on_event(ActorLost("worker", "a", 1), 2.0)
    assert workers.totals.generated_tokens == 110
    workers.update_stats("a", make_stats(1.5, tokens=120), 2.0)  # from before its death
    begin(workers, "a", 2.0, ready_s=3.0)
    workers.update_stats("a", make_stats(0.5, tokens=7), 4.0)
    assert workers.totals.generated_tokens == 117
    workers.end(5.0)
    assert workers.totals.generated_tokens == 117


def test_an_event_has_each_workers_share_since_the_event_before() -> None:
    workers = Workers()
    begin(workers, "a", 0.0, ready_s=0.0)
    assert workers.sample(0.0) == []
    for second in range(11):
        workers.update_stats("a", make_stats(second, busy_s=second), second)
    (first,) = workers.sample(10.0)
    assert (first.actor, first.node, first.busy, first.seqs) == ("a", "node-a", 1.0, 3)
    for second in range(11, 21):
        workers.update_stats("a", make_stats(second, busy_s=10 + (second - 10) / 5, free_blocks=4), second)
    (second_event,) = workers.sample(20.0)
    assert (second_event.busy, second_event.kv_use) == (0.2, 0.6)


def test_the_lowest_limits_of_workers_are_shown_and_kept_to_the_end() -> None:
    workers = Workers()
    assert workers.limits(0.0) == (0, 0)
    for actor in ("a", "b"):
        begin(workers, actor, 0.0, ready_s=0.0)
        workers.update_stats(actor, make_stats(500.0), 1.0)
    assert workers.limits(1.0) == (64, 512)
    lowered = replace(make_stats(501.0), max_num_seqs=32, totals=Metrics(lowered_limits=1))
    workers.update_stats("b", lowered, 2.0)
    assert workers.limits(2.0) == (32, 512)
    workers.end(3.0)
    assert workers.limits(3.0) == (32, 512)
    assert workers.totals.lowered_limits == 1
