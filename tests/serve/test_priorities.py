"""Low-priority requests (service_tier "flex") yield to other requests."""

import threading

from held_steps import wait_for
from http_calls import MODEL, call
from served import Served, served


def ask(local: Served, tier: str, max_tokens: int) -> None:
    """Send a request and check that it has all of its tokens."""
    body = {"model": MODEL, "prompt": "In", "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    reply = call(f"{local.url}/v1/completions", body | {"service_tier": tier})
    assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == max_tokens


def test_a_full_house_of_bulk_lets_others_pass_and_loses_nothing() -> None:
    with served(max_num_seqs=2) as local:
        clients = [threading.Thread(target=ask, args=(local, "flex", 200)) for _ in range(6)]
        for client in clients:
            client.start()
        wait_for(lambda: local.endpoint.engine.num_seqs == 6)
        for tier in ("auto", "default", "priority", "auto"):
            ask(local, tier, max_tokens=2)
        assert any(client.is_alive() for client in clients), "nothing was bulk any more"
        for client in clients:
            client.join()
        assert local.engine.metrics.preemptions > 0
