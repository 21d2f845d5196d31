"""The endpoint under load while things go wrong. Every client gets an answer or a clean error, and what was taken comes
back: places, blocks, replicas."""

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
from http_calls import MODEL, call, events
from moray_serve import MorayServe
from patience import PATIENCE_S

pytestmark = pytest.mark.slow
LONG = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True, "stream": True}
SHORT = {"model": MODEL, "prompt": [5], "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[MorayServe]:
    serve = MorayServe("--dtype", "float32", "--set", "max_num_seqs=16", "--set", "max_waiting=3000")
    try:
        serve.wait_ready()
        yield serve
    finally:
        serve.stop()


def open_stream(endpoint: MorayServe) -> socket.socket:
    """A request whose answer nobody reads yet."""
    body = json.dumps(LONG).encode()
    client = socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2])), timeout=PATIENCE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    return client


def wait_until_idle(endpoint: MorayServe) -> None:
    endpoint.wait_for(lambda: endpoint.metric("moray_seqs") + endpoint.metric("moray_waiting_seqs") == 0)
    endpoint.wait_for(lambda: endpoint.metric("moray_free_blocks") == endpoint.metric("moray_blocks"))


def test_clients_that_vanish_in_mid_stream(endpoint: MorayServe) -> None:
    clients = [open_stream(endpoint) for _ in range(20)]
    for client in clients[:10]:
        assert client.recv(10).startswith(b"HTTP/1.1 2"), "it has begun"
    assert endpoint.metric("moray_seqs") == 20
    assert endpoint.metric("moray_free_blocks") < endpoint.metric("moray_blocks")
    generated = endpoint.metric("moray_generated_tokens_total")
    for client in clients:
        client.close()
    wait_until_idle(endpoint)
    assert endpoint.metric("moray_generated_tokens_total") - generated < 20 * 500 / 2, "they were not run to their end"


def test_a_client_that_gives_up_waiting_for_a_whole_answer(endpoint: MorayServe) -> None:
    generated = endpoint.metric("moray_generated_tokens_total")
    with (
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="x", max_retries=0, timeout=0.3) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.completions.create(model=MODEL, prompt=[5], max_tokens=2000, extra_body={"ignore_eos": True})
    wait_until_idle(endpoint)
    assert endpoint.metric("moray_generated_tokens_total") - generated < 2000, "it was not run to its end"


def test_a_slow_reader_keeps_nobody_waiting(endpoint: MorayServe) -> None:
    slow = open_stream(endpoint)
    slow.recv(1)
    for _ in range(5):
        assert call(f"{endpoint.url}/v1/completions", SHORT).status == 200
    endpoint.wait_for(lambda: endpoint.metric("moray_seqs") == 0)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(1 << 20)
        assert received
    slow.close()
    assert received.count(b'"finish_reason":"length"') == 1, "all of it is there when it is read at last"


def test_two_thousand_connections_at_once(endpoint: MorayServe) -> None:
    number = 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < number + 200:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 200), hard))
    body = json.dumps(SHORT).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    port = int(endpoint.url.rpartition(":")[2])

    async def one(everybody: asyncio.Barrier) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await everybody.wait()
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        answer = await reader.read()
        writer.close()
        return answer.split(b"\r\n", 1)[0]

    async def all_of_them() -> list[bytes]:
        everybody = asyncio.Barrier(number)
        return await asyncio.wait_for(asyncio.gather(*(one(everybody) for _ in range(number))), 100)

    assert set(asyncio.run(all_of_them())) == {b"HTTP/1.1 200 OK"}
    wait_until_idle(endpoint)


def test_a_replica_that_is_killed_under_load(endpoint: MorayServe) -> None:
    outcomes: list[str] = []
    texts: set[str] = set()

    def ask(is_stream: bool) -> None:
        try:
            reply = call(f"{endpoint.url}/v1/completions", LONG | {"stream": is_stream})
        except (OSError, http.client.HTTPException) as error:
            outcomes.append(f"no answer: {type(error).__name__}")
        else:
            if reply.status != 200:
                texts.add(reply.text)
            is_whole = '"finish_reason":"length"' in reply.text
            outcomes.append("whole" if is_whole else "cut" if reply.status == 200 else str(reply.status))

    clients = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(24)]
    for client in clients:
        client.start()
    endpoint.wait_for(lambda: endpoint.metric("moray_seqs") == 24)
    (replica,) = endpoint.replicas()
    os.kill(replica, signal.SIGKILL)
    for client in clients:
        client.join(90)
        assert not client.is_alive(), "a client hangs"
    assert len(outcomes) == 24
    assert not any("Traceback" in text or "File " in text for text in texts), texts
    assert "whole" not in outcomes, "all were in flight, far from their end"

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            return call(f"{endpoint.url}/v1/completions", SHORT).status == 200
        return False

    endpoint.wait_for(is_back)
    assert endpoint.replicas() != [replica]
    wait_until_idle(endpoint)


def test_the_end_waits_for_what_runs(endpoint: MorayServe) -> None:
    """The last test: afterwards there is no endpoint."""
    running: list[str] = []
    clients = [
        threading.Thread(target=lambda: running.append(call(f"{endpoint.url}/v1/completions", LONG).text))
        for _ in range(4)
    ]
    for client in clients:
        client.start()
    endpoint.wait_for(lambda: endpoint.metric("moray_seqs") == 4)
    code, output = endpoint.stop(signal.SIGINT)
    for client in clients:
        client.join(10)
    assert code == 0 and output.endswith("Finishing what runs; a second signal ends at once\n")
    assert [events(text)[-1]["choices"][0]["finish_reason"] for text in running] == ["length"] * 4
