"""Tests of EngineLoop with an engine whose steps the tests hold."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from held_steps import HeldSteps, wait_for
from patience import PATIENCE_S

from moray.engine.engine_loop import EngineLoop
from moray.engine.errors import RequestError, UserError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Output, Request


class FakeEngine:
    """Finishes every request in one step, and records what it was asked in which thread."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.interrupts: list[int] = []
        self._requests: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        self._record(f"add {request.request_id}")
        if request.request_id == "bad":
            raise RequestError("too_long", "too long")
        self._requests.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self._record(f"abort {request_id}")
        self._requests.remove(request_id)

    def step(self) -> list[Output]:
        self._record("step")
        done, self._requests = self._requests, []
        return [Output(name, 0, (5,), Completion((5,), "length", 1)) for name in done]

    def interrupt_step(self, priority: int) -> None:
        self.interrupts.append(priority)

    def _record(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)


class Host:
    """Records what a loop reports."""

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.rejections: list[tuple[str, str]] = []
        self.failures: list[BaseException] = []

    def after_step(self, outputs: Sequence[Output]) -> None:
        self.outputs += [output.request_id for output in outputs]

    def on_rejection(self, request: Request, error: RequestError) -> None:
        self.rejections.append((request.request_id, error.code))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def start(engine: FakeEngine, host: Host) -> Iterator[Callable[..., EngineLoop]]:
    """Return a function that starts a loop, which ends with the test."""
    loops = []

    def start_loop(**options: Any) -> EngineLoop:
        callbacks = {
            "after_step": host.after_step, "on_rejection": host.on_rejection, "on_failure": host.failures.append,
        }  # fmt: skip
        loops.append(loop := EngineLoop(lambda: engine, **callbacks | options))  # type: ignore[arg-type, return-value]
        loop.start().result(PATIENCE_S)
        return loop

    yield start_loop
    for loop in loops:
        loop.close()
        loop.join(PATIENCE_S)
        assert not loop._thread.is_alive()


def request(request_id: str, priority: int = 0) -> Request:
    return Request(request_id, [1], SamplingParams(), priority=priority)


def test_the_engine_is_built_and_used_in_one_thread(engine: FakeEngine, host: Host) -> None:
    def make_engine() -> Any:
        engine.threads.add(threading.current_thread().name)
        return engine

    loop = EngineLoop(make_engine, after_step=host.after_step, on_failure=host.failures.append)
    loop.start().result(PATIENCE_S)
    loop.submit([request("a")])
    wait_for(lambda: host.outputs == ["a"])
    loop.close()
    loop.join(PATIENCE_S)
    assert engine.threads == {"engine"} and loop.engine is engine


def test_start_raises_what_building_the_engine_raised(host: Host) -> None:
    def make_engine() -> Any:
        raise UserError("no such model")

    loop = EngineLoop(make_engine, after_step=host.after_step, on_failure=host.failures.append)
    with pytest.raises(UserError, match="no such model"):
        loop.start().result(PATIENCE_S)
    assert host.failures == []


def test_commands_run_between_steps(engine: FakeEngine, host: Host, start: Callable[..., EngineLoop]) -> None:
    loop = start()
    with HeldSteps(engine) as steps:
        loop.submit([request("a"), request("b", priority=3)])
        steps.wait_until_held()
        loop.submit([request("c", priority=2)])
        loop.run_between_steps(lambda: engine.calls.append("command"))
        loop.submit([request("d")])
        loop.abort(["c"])
        assert engine.calls == ["add a", "add b"], "a step runs"
        steps.run()
    wait_for(lambda: len(host.outputs) == 3)
    assert engine.calls == ["add a", "add b", "step", "add c", "command", "add d", "abort c", "step"]
    assert host.outputs == ["a", "b", "d"]
    assert engine.interrupts == [0, 2, 0], "the highest priority of each submission"


def test_a_refused_request_ends_its_submission_alone(
    engine: FakeEngine, host: Host, start: Callable[..., EngineLoop]
) -> None:
    loop = start()
    with HeldSteps(engine) as steps:
        loop.submit([request("a"), request("bad"), request("b")])
        loop.submit([request("c")])
        steps.wait_until_held()
    wait_for(lambda: host.outputs == ["a", "c"])
    assert host.rejections == [("bad", "too_long")] and host.failures == []


def test_before_a_step_and_before_it_waits_the_loop_asks_for_more(
    engine: FakeEngine, host: Host, start: Callable[..., EngineLoop]
) -> None:
    more = [request("c"), request("b")]
    loop = start(before_step=lambda: engine.add(more.pop()) if more and not engine.has_work else None)
    loop.submit([request("a")])
    wait_for(lambda: host.outputs == ["a", "b", "c"])
    assert engine.calls == ["add a", "step", "add b", "step", "add c", "step"]


def test_a_step_that_does_not_come_back_is_a_stall_and_an_idle_engine_is_none(
    engine: FakeEngine, host: Host, start: Callable[..., EngineLoop]
) -> None:
    now_s = 10.0
    loop = start(clock=lambda: now_s)
    assert loop.stalled_s == 0.0
    with HeldSteps(engine) as steps:
        loop.submit([request("a")])
        steps.wait_until_held()
        now_s = 15.0
        assert loop.stalled_s == 5.0
        loop.submit([request("b")])
        steps.run()
        assert loop.stalled_s == 0.0, "a step came back now"
        now_s = 22.0
        assert loop.stalled_s == 7.0
    wait_for(lambda: loop.stalled_s == 0.0)
    assert host.outputs == ["a", "b"]


@pytest.mark.parametrize("place", ["step", "before_step", "after_step", "command"])
def test_an_exception_ends_the_loop_and_is_reported(
    place: str, engine: FakeEngine, host: Host, start: Callable[..., EngineLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError(place)

    if place == "step":
        monkeypatch.setattr(engine, "step", broken)
    loop = start(**({place: broken} if place in ("before_step", "after_step") else {}))
    if place == "command":
        loop.run_between_steps(broken)
    loop.submit([request("a")])
    loop.join(PATIENCE_S)
    assert [str(failure) for failure in host.failures] == [place]


def test_close_lets_the_step_and_earlier_commands_finish(
    engine: FakeEngine, host: Host, start: Callable[..., EngineLoop]
) -> None:
    loop = start()
    with HeldSteps(engine) as steps:
        loop.submit([request("a")])
        steps.wait_until_held()
        loop.submit([request("b")])
        loop.close()
        loop.submit([request("c")])
        steps.allow()
        loop.join(PATIENCE_S)
    assert host.outputs == ["a"] and engine.calls == ["add a", "step", "add b"]
