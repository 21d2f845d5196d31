"""A replica's own port: request ids, the log, and draining."""

import asyncio
import logging
import socket

import pytest
from patience import PATIENCE_S
from ports import free_port
from starlette.types import Receive, Scope, Send

from moray.serve.replica_server import ReplicaServer


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def ask(port: int, path: str, *headers: str, until_closed: bool = False) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
    answer = await (reader.read() if until_closed else reader.readuntil(b"ok"))
    writer.close()
    return answer.decode()


def test_each_request_has_an_id_and_a_line_in_the_log() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ray.serve")
    level = log.level

    async def main() -> tuple[str, str, str]:
        listener = ReplicaServer.open(app, "127.0.0.1", port)
        mine, one, other = [await ask(port, "/a", *headers) for headers in (("X-Request-ID: mine-1",), (), ())]
        await listener.drain()
        return mine, one, other

    port = free_port()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        mine, one, other = asyncio.run(main())
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    ids = [answer.partition("x-request-id: ")[2].split("\r\n")[0] for answer in (mine, one, other)]
    assert ids[0] == "mine-1" and len(ids[1]) == 36 and len(set(ids)) == 3
    assert [line.rpartition(" ")[2] for line in lines] == ids
    assert all(line.startswith("GET /a 200 ") for line in lines)


def test_at_the_end_what_runs_is_answered_and_nobody_else_gets_in() -> None:
    async def main() -> str:
        has_begun, may_end = asyncio.Event(), asyncio.Event()

        async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/slow":
                has_begun.set()
                await may_end.wait()
            await app(scope, receive, send)

        listener = ReplicaServer.open(slow_app, "127.0.0.1", port)
        slow = asyncio.create_task(ask(port, "/slow", until_closed=True))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)  # an idle connection
        await has_begun.wait()
        draining = asyncio.create_task(listener.drain())
        assert await reader.read() == b""  # closed: the server drains
        writer.close()
        with pytest.raises((ConnectionRefusedError, ConnectionResetError, asyncio.IncompleteReadError)):
            await ask(port, "/late")
        assert not slow.done() and not draining.done()
        may_end.set()
        answer = await slow
        await draining
        return answer

    port = free_port()
    assert asyncio.run(asyncio.wait_for(main(), PATIENCE_S)).endswith("ok")


def test_a_successor_may_listen_before_the_port_is_let_go() -> None:
    async def main() -> None:
        first = ReplicaServer.open(app, "127.0.0.1", port)
        second = ReplicaServer.open(app, "127.0.0.1", port)
        await first.drain()
        for _ in range(5):
            assert (await ask(port, "/a")).endswith("ok")
        await second.drain()

    port = free_port()
    asyncio.run(main())


def test_a_port_of_somebody_else() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
            ReplicaServer.open(app, "127.0.0.1", other.getsockname()[1])

    asyncio.run(main())
