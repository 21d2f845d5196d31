import pytest

from moray.batch.plan.nodes import Node, Placement
from moray.batch.run_events import ActorReady, ActorStarted, StartFailed
from moray.batch.runtime.startup_timeout import NOTE_S, StartupTimeout
from moray.engine.errors import JobError

STAGES = {"prepare": Placement(0.2), "worker": Placement(0.5, 1.0)}


def ready(stage: str) -> ActorReady:
    return ActorReady(stage, "a", 1, "node")


def started(stage: str) -> ActorStarted:
    return ActorStarted(stage, "a", "node")


def make(timeout_s: float | None = 60.0) -> StartupTimeout:
    return StartupTimeout(STAGES, timeout_s, lambda: [Node({"CPU": 2.0}, {})])


def test_a_stage_without_a_node_is_reported_once_and_ends_the_job() -> None:
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
    watch.on_event(ready("prepare"))
    watch.on_event(started("worker"))
    assert watch.check(NOTE_S + 1) is None
    with pytest.raises(JobError, match=r"still getting ready, a worker by loading the model$"):
        watch.check(61.0)


def test_a_start_that_failed_is_the_reason() -> None:
    watch = make()
    watch.on_event(started("worker"))
    watch.on_event(StartFailed("worker", "a", "node", "no driver", 1))
    watch.on_event(ready("prepare"))
    with pytest.raises(JobError, match=r": its last start failed: no driver$"):
        watch.check(61.0)


def test_a_job_that_has_begun_or_has_all_the_time() -> None:
    watch = make()
    for stage in STAGES:
        watch.on_event(ready(stage))
    assert watch.check(1e9) is None
    assert make(None).check(1e9) is not None  # a message, but no end


def test_a_node_that_is_busy() -> None:
    watch = make()
    watch.on_event(started("worker"))
    reason = "1 of 1 nodes could run it, but are busy, or still starting its process"
    assert watch.check(NOTE_S + 1) == f"Waiting for a place for prepare: {reason}"


def test_a_ray_of_its_own_that_starts_slowly_is_not_called_busy() -> None:
    watch = StartupTimeout(
        {"prepare": Placement(0.2)}, 60.0, lambda: [Node({"CPU": 2.0}, {})], began_s=30.0, is_own=True
    )
    assert watch.check(NOTE_S + 29) is None  # the start of Ray does not count
    reason = "there is room for it, and Ray is still starting its process"
    assert watch.check(NOTE_S + 31) == f"Waiting for a place for prepare: {reason}"
