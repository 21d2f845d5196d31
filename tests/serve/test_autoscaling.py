"""Replicas by queued tokens: the policy as a table, and under a real load."""

import threading
from types import SimpleNamespace

import pytest
from http_calls import MODEL, call
from moray_serve import MorayServe

from moray.serve.autoscaling import ByQueuedTokens


@pytest.mark.parametrize(("tokens", "replicas"), [({}, 1), ({"a": 0}, 1), ({"a": 100}, 1), ({"a": 101, "b": 100}, 3)])
def test_one_replica_for_so_many_tokens(tokens: dict[str, float], replicas: int) -> None:
    context = SimpleNamespace(aggregated_metrics={"queued_tokens": tokens})
    assert ByQueuedTokens(tokens_per_replica=100)(context) == (replicas, {})


def test_before_any_replica_has_said_anything() -> None:
    assert ByQueuedTokens(tokens_per_replica=100)(SimpleNamespace(aggregated_metrics=None)) == (1, {})


@pytest.mark.slow
def test_a_few_long_requests_bring_a_second_replica_and_their_end_takes_it_away() -> None:
    settings = "max_replicas=2", "queued_tokens_per_replica=3000", "upscale_delay_s=1", "downscale_delay_s=1"
    endpoint = MorayServe(*(argument for setting in settings for argument in ("--set", setting)))
    try:
        endpoint.wait_ready()
        body = {"model": MODEL, "prompt": [5], "max_tokens": 1500, "ignore_eos": True}
        clients = [threading.Thread(target=call, args=(f"{endpoint.url}/v1/completions", body)) for _ in range(3)]
        for client in clients:
            client.start()
        endpoint.wait_for(lambda: len(endpoint.replicas()) == 2)
        for client in clients:
            client.join()
        endpoint.wait_for(lambda: len(endpoint.replicas()) == 1)
        assert call(f"{endpoint.url}/v1/models").status == 200
    finally:
        assert endpoint.stop()[0] == 0
