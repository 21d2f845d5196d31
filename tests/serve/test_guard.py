"""Keys and sizes: which requests pass the guard."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from http_calls import MODEL, Reply, call
from patience import PATIENCE_S
from prometheus_client import CollectorRegistry, Counter
from served import Served, served
from starlette.types import Message, Receive, Scope, Send

from moray.serve.guard import RequestGuardMiddleware
from moray.serve.keys import CHECK_EVERY_S, ENVIRONMENT, Keys


def ask(local: Served, authorization: str | None = None) -> Reply:
    headers = {} if authorization is None else {"Authorization": authorization}
    return call(f"{local.url}/v1/completions", {"model": MODEL, "prompt": [5], "max_tokens": 1}, headers)


def test_without_keys_any_authorization_is_ignored(local: Served) -> None:
    for authorization in (None, "Bearer x", "Basic eDp5", "nonsense"):
        assert ask(local, authorization).status == 200


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none  # Ada's\n\ntwo\n")
    monkeypatch.setenv(ENVIRONMENT, "three, four")
    with served(keys_file=str(file)) as local:
        for key in ("one", "two", "three", "four"):
            assert ask(local, f"Bearer {key}").status == 200
        for authorization, code in (
            (None, "missing_api_key"),
            ("Bearer five", "invalid_api_key"),
            ("Bearer", "invalid_api_key"),
            ("Bearer # ours", "invalid_api_key"),
            ("Basic one", "invalid_api_key"),
            ("Bearer one\u00e9".encode().decode("latin-1"), "invalid_api_key"),
        ):
            reply = ask(local, authorization)
            assert (reply.status, reply.error["code"]) == (401, code)
            assert reply.headers["www-authenticate"] == "Bearer" and reply.error["type"] == "authentication_error"
        for path, status in (("/health", 200), ("/ready", 200), ("/", 200), ("/v1/models", 401), ("/metrics", 401)):
            assert call(local.url + path).status == status
        assert call(f"{local.url}/score", b"{}").status == 401


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    clock = [0.0]
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = Keys(str(file), lambda: clock[0])
    assert keys.find("Bearer old") and not keys.find("Bearer new")
    file.write_text("new\n")
    os.utime(file, (time.time() + 5, time.time() + 5))
    assert keys.find("Bearer old"), "it is not looked at so often"
    clock[0] += CHECK_EVERY_S
    assert keys.find("Bearer new") and not keys.find("Bearer old")
    file.unlink()
    clock[0] += CHECK_EVERY_S
    assert keys.find("Bearer new"), "what was read last stays valid"
    file.write_text("")
    clock[0] += CHECK_EVERY_S
    assert not keys.find("Bearer new") and keys.are_configured, "an emptied file lets nobody in"


def test_a_key_is_named_without_being_told(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    name = Keys(str(tmp_path / "keys")).find("bearer secret")
    assert name is not None and len(name) == 8 and "secret" not in name


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        Keys("/nowhere")


def test_sizes() -> None:
    with served(max_body_bytes=1000) as local:
        reply = call(f"{local.url}/v1/completions", b" " * 1001)
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")
        reply = call(f"{local.url}/v1/models", headers={"X-Long": "a" * 17_000})
        assert (reply.status, reply.error["code"]) == (431, "headers_too_large")
        with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2])), timeout=PATIENCE_S) as client:
            client.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("client", "is_public", "status"),
    [
        (("127.0.0.1", 5), False, 200),
        (("::1", 5), False, 200),
        (None, False, 200),
        (("10.1.2.3", 5), False, 403),
        (("10.1.2.3", 5), True, 200),
        (("nonsense", 5), False, 403),
    ],
)
def test_without_keys_only_this_machine_is_served(client: tuple[str, int] | None, is_public: bool, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["state"]["key"] == "anybody"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    counter = Counter("x", "x", ["path", "status"], registry=CollectorRegistry())
    guard = RequestGuardMiddleware(app, Keys(None), 10, is_public, counter)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "client": client}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == status


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_runs_for_a_client_that_goes_is_stopped(local: Served, is_stream: bool) -> None:
    engine = local.endpoint.engine
    generated = engine.stats().totals.generated_tokens
    body = json.dumps({"model": MODEL, "prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": is_stream})
    with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2]))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_until(lambda: engine.num_seqs == 1)
    wait_until(lambda: engine.num_seqs == 0)
    assert engine.stats().totals.generated_tokens - generated < 1500, "it was not run to its end"
    assert local.endpoint.admission.num_samples == 0


def wait_until(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)
