"""Bulk requests (service_tier "flex") make way to the others."""

import threading
import time

from http_calls import MODEL, call
from served import Served, served


def ask(local: Served, tier: str, max_tokens: int) -> float:
    """Seconds that a request took, once its text is known to be what it is alone."""
    started = time.monotonic()
    body = {"model": MODEL, "prompt": "In", "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    reply = call(f"{local.url}/v1/completions", body | {"service_tier": tier})
    assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == max_tokens
    return time.monotonic() - started


def test_a_full_house_of_bulk_lets_others_pass_and_loses_nothing() -> None:
    with served(max_num_seqs=2) as local:
        bulk_seconds: list[float] = []
        clients = [
            threading.Thread(target=lambda: bulk_seconds.append(ask(local, "flex", max_tokens=200))) for _ in range(6)
        ]
        for client in clients:
            client.start()
        while local.endpoint.engine.load.seqs < 6:
            time.sleep(0.01)
        seconds = [ask(local, tier, max_tokens=2) for tier in ("auto", "default", "priority", "auto")]
        assert any(client.is_alive() for client in clients), "nothing was bulk any more"
        for client in clients:
            client.join()
        assert local.endpoint.engine.metrics.preemptions > 0
    assert max(seconds) < min(bulk_seconds) / 4
