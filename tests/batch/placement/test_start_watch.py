import pytest

from batch.placement.nodes import Node, Placement
from batch.placement.start_watch import NOTE_S, StartWatch
from engine.errors import JobError

STAGES = {"prepare": Placement(0.2), "worker": Placement(0.5, 1.0)}


def make(timeout_s: float | None = 60.0) -> StartWatch:
    return StartWatch(STAGES, timeout_s, lambda: [Node({"CPU": 2.0}, {})])


def test_a_stage_without_a_place_is_told_once_and_ends_the_job() -> None:
    watch = make()  # prepare has a node, and is only late
    assert watch.check(NOTE_S - 1) is None
    reason = "no node has 1 GPU and 0.5 CPUs; the cluster has 1 x 2 CPUs"
    assert watch.check(NOTE_S + 1) == f"Waiting for a place for worker: {reason}"
    assert watch.check(NOTE_S + 2) is None
    with pytest.raises(JobError) as failure:
        watch.check(61.0)
    assert str(failure.value) == f"no actor of worker was ready within 60 s (workers.start_timeout_s): {reason}"


def test_a_model_that_takes_too_long_to_load() -> None:
    watch = make()
    watch.take("actor_ready", {"stage": "prepare"})
    watch.take("actor_started", {"stage": "worker"})
    assert watch.check(NOTE_S + 1) is None
    with pytest.raises(JobError, match=r"still getting ready, a worker by loading the model$"):
        watch.check(61.0)


def test_a_job_that_has_begun_or_has_all_the_time() -> None:
    watch = make()
    for stage in STAGES:
        watch.take("actor_ready", {"stage": stage})
    assert watch.check(1e9) is None
    assert make(None).check(1e9) is not None  # tells of it, and waits


def test_a_place_that_is_taken() -> None:
    watch = make()
    watch.take("actor_started", {"stage": "worker"})
    assert watch.check(NOTE_S + 1) == "Waiting for a place for prepare: 1 of 1 nodes could take it, but are busy"
