"""ReplicaServer lets a replica listen on a port of its own, where there is one replica and so no need of a proxy.

It does what Serve's proxy would do: give requests ids, write a line of Serve's log for each, and drain at the end.
"""

import asyncio
import logging
import socket
import time
import uuid

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")  # a replica's log file

KEEP_ALIVE_S = 90  # for which an idle connection stays open; the value of Serve's proxy
BACKLOG = 2048  # connections that the kernel queues until they are accepted; uvicorn's default
REQUEST_ID = "x-request-id"
GONE = 499  # status in the log for a client that disconnected before it was answered; nginx's number


class ReplicaServer:
    """Serves an ASGI application in the event loop in which it was opened."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket) -> None:
        """Start to serve on a socket that listens. Call open() instead."""
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[listening]))

    @classmethod
    def open(cls, app: ASGIApp, host: str, port: int) -> "ReplicaServer":
        """Listen on host and port and serve `app`. Raises OSError where it cannot listen there."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # reuse_port: Serve starts a replica's successor before the replica has released the port.
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the guard logs what it would log
        config = uvicorn.Config(
            AccessLogMiddleware(app),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
        )
        return cls(uvicorn.Server(config), listening)

    async def drain(self) -> None:
        """Accept no more connections, close idle ones, and return when all requests are answered."""
        self._server.should_exit = True
        await self._serving


class AccessLogMiddleware:
    """Gives each request an id, the client's where it sent one, and logs how it ended, as ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        request_id = Headers(scope=scope).get(REQUEST_ID) or str(uuid.uuid4())
        status = GONE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            milliseconds = 1000 * (time.monotonic() - started_s)
            logger.info("%s %s %d %.1fms %s", scope["method"], scope["path"], status, milliseconds, request_id)
