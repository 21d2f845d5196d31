"""Admission as a table, and as clients see it."""

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from held_steps import HeldSteps, wait_for
from http_calls import MODEL, Reply, call, events
from served import Served, served

from moray.serve.admission import AdmissionController
from moray.serve.errors import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(admit: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        admit()
    return refused.value


def test_the_endpoint_holds_so_many_samples() -> None:
    admission = AdmissionController(4)
    with ExitStack() as stack:
        stack.enter_context(admission.admit("a", 3))
        error = refusal(lambda: stack.enter_context(admission.admit("b", 2)))
        assert (error.status, error.code, error.headers["Retry-After"]) == (429, "overloaded", "1")
        stack.enter_context(admission.admit("b", 1))
        assert admission.num_samples == 4
    assert admission.num_samples == 0
    with admission.admit("b", 4):
        pass
    error = refusal(lambda: admission.admit("b", 5).__enter__())
    assert (error.status, error.code) == (400, "too_many_samples"), "it would never fit"


def test_a_key_has_so_many_requests_at_once() -> None:
    admission = AdmissionController(100, max_concurrent=2)
    with admission.admit("a", 1), admission.admit("a", 1):
        assert refusal(lambda: admission.admit("a", 1).__enter__()).code == "rate_limit_exceeded"
        with admission.admit("b", 1):
            pass
    with admission.admit("a", 1):
        pass


def test_a_key_sends_so_many_requests_a_minute() -> None:
    clock = Clock()
    admission = AdmissionController(100, max_per_minute=3, clock=clock)

    def send() -> None:
        with admission.admit("a", 1):
            pass

    for _ in range(3):
        send()
    error = refusal(send)
    assert (error.status, error.headers["Retry-After"]) == (429, "20")
    with admission.admit("b", 1):
        pass
    clock.now += 19.9
    assert refusal(send).headers["Retry-After"] == "1"
    clock.now += 0.2
    send()
    refusal(send)
    clock.now += 600
    for _ in range(3):
        send()
    refusal(send)


def test_what_is_refused_costs_nothing() -> None:
    admission = AdmissionController(1, max_concurrent=5, max_per_minute=2)
    with admission.admit("a", 1):
        for _ in range(5):
            assert refusal(lambda: admission.admit("a", 1).__enter__()).code == "overloaded"
    with admission.admit("a", 1):
        pass


def ask(local: Served, **fields: object) -> Reply:
    body = {"model": MODEL, "prompt": [5], "max_tokens": 100, "ignore_eos": True} | fields
    return call(f"{local.url}/v1/completions", body)


def test_too_many_at_once_are_told_to_come_again() -> None:
    with served(max_num_seqs=2, max_waiting=2) as local:
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda: replies.append(ask(local, max_tokens=5))) for _ in range(12)]
        with HeldSteps(local.engine):
            for thread in threads:
                thread.start()
            wait_for(lambda: len(replies) == 8)  # no other one is answered while the engine is held
        for thread in threads:
            thread.join()
        refused = [reply for reply in replies if reply.status != 200]
        assert (len(replies), len(refused)) == (12, 8)
        assert {(reply.status, reply.error["code"]) for reply in refused} == {(429, "overloaded")}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert ask(local).status == 200
        assert ask(local, n=5).error["code"] == "too_many_samples"


def test_a_request_over_its_time_is_stopped() -> None:
    with served(request_timeout_s=0.3) as local:
        reply = ask(local, max_tokens=2000)
        assert (reply.status, reply.error["code"]) == (504, "timeout")
        *_, error = events(ask(local, max_tokens=2000, stream=True).text)
        assert error["error"]["code"] == "timeout"
        assert ask(local, max_tokens=1).status == 200
        assert local.endpoint.engine.num_seqs == 0
