"""RequestGuardMiddleware checks a request's key and the sizes of its headers and body before it reaches a route.

It also turns an exception of the application into an error response, and aborts the request of a client that has gone.
"""

import asyncio
import logging
import traceback
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moray.serve.errors import ApiError
from moray.serve.keys import Keys

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 << 10  # names and values of all headers of a request
BODY_TIMEOUT_S = 60.0  # for the whole body to arrive; for the next piece of one that is streamed
FORM_BYTES = 16 << 10  # of a streamed body that are not the file in it
OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/ready"})  # served without a key: no model behind
ANYBODY = "anybody"  # the key's name of a request that needs none


class RequestGuardMiddleware:
    """Checks a request's key and sizes before the application receives it, as ASGI middleware.

    It sets scope["state"]["key"] to the name of the request's key.

    keys:       valid keys; where none are configured, clients on this machine are served whatever key they send
    is_public:  serve other machines even where no keys are configured
    streamed:   paths of POST requests whose body the application reads piece by piece -> largest file in it
    requests:   counter of responses by path and status
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        max_body_bytes: int,
        is_public: bool,
        requests: Counter,
        streamed: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._is_public = is_public
        self._requests = requests
        self._streamed = streamed or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["method"] == "HEAD":  # answered as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._serve(scope, receive, count)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST" and scope["path"] in self._streamed:
            return await self._serve_streamed(scope, receive, send)
        try:
            key = self._check(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            return await error.response(scope, receive, send)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["key"] = key
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                await asyncio.Event().wait()  # for ever: _watch receives the disconnect, not the application
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(_watch(receive))
                await self._run(scope, replay, send)
                watching.cancel()
        except* _ClientGone:
            pass

    async def _serve_streamed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose body is larger than memory should hold."""
        body = _StreamedBody(receive, self._streamed[scope["path"]] + FORM_BYTES)

        async def send_after_body(message: Message) -> None:
            # A client that still sends does not read an answer: it would see a broken connection.
            if message["type"] == "http.response.start":
                await body.drain()
            await send(message)

        try:
            key = self._check(scope)
            length = Headers(scope=scope).get("content-length", "")
            if length.isdecimal() and int(length) > body.max_bytes:
                raise body.too_large
        except ApiError as error:
            return await error.response(scope, receive, send_after_body)
        scope.setdefault("state", {})["key"] = key
        with suppress(_ClientGone):
            await self._run(scope, body.receive, send_after_body)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application and answer 500 where it raises. Starlette's own answer would be followed by a raise."""
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            # Log where it was raised, not its message, which may quote a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in %s %s\n%s", type(error).__name__, scope["method"], scope["path"], frames)
            if not has_started:
                await _BUG.response(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        """Return the name of the request's key. Raises ApiError for headers that are too large or a key that is not
        valid."""
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            raise ApiError(
                431, "headers_too_large", f"the headers have {size:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
            )
        if scope["path"] in OPEN_PATHS:
            return ANYBODY
        if not self._keys.are_configured:
            if not self._is_public and not _is_local(scope):
                raise ApiError(
                    403,
                    "no_keys",
                    "this endpoint has no keys, so it serves its own machine only; its operator can set keys_file, "
                    "MORAY_API_KEYS or is_public",
                )
            return ANYBODY
        authorization = Headers(scope=scope).get("authorization")
        if authorization is None:
            raise ApiError(401, "missing_api_key", "send a key: Authorization: Bearer KEY", headers=_CHALLENGE)
        key = self._keys.find(authorization)
        if key is None:
            raise ApiError(401, "invalid_api_key", "the key is not valid at this endpoint", headers=_CHALLENGE)
        return key

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Receive the whole body. Raises ApiError as soon as it is too large, or where it does not arrive in time."""
        limit = self._max_body_bytes
        too_large = ApiError(413, "body_too_large", f"the body is larger than {limit:,} bytes, this endpoint's limit")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "body_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None


class _ClientGone(BaseException):
    """Stops the request of a client that has disconnected. No route catches it, as it is no Exception."""


class _StreamedBody:
    """Receives a body piece by piece, with a limit on its size and on the time until the next piece.

    max_bytes:  largest body
    """

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._receive = receive
        self._num_bytes = 0
        self._is_over = False

    @property
    def too_large(self) -> ApiError:
        message = f"the body is larger than {self.max_bytes:,} bytes, this endpoint's limit"
        return ApiError(413, "body_too_large", message)

    async def receive(self) -> Message:
        """Return the next message. Raises ApiError, or _ClientGone."""
        if self._is_over:  # the application waits for the client to disconnect
            await asyncio.Event().wait()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._receive()
        except TimeoutError:
            self._is_over = True
            raise ApiError(408, "body_timeout", f"nothing arrived for {BODY_TIMEOUT_S:g} s") from None
        if message["type"] == "http.disconnect":
            self._is_over = True
            raise _ClientGone
        self._num_bytes += len(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
        if self._num_bytes > self.max_bytes:
            raise self.too_large
        return message

    async def drain(self) -> None:
        """Receive and forget the rest of a body that is not much larger than the limit."""
        limit, self.max_bytes = self.max_bytes, 2 * self.max_bytes
        with suppress(ApiError):
            while not self._is_over:
                await self.receive()
        self.max_bytes = limit


async def _watch(receive: Receive) -> None:
    """Raise _ClientGone when the client disconnects. Serve's proxy stops such a request; other servers do not."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientGone


_BUG = ApiError(500, "internal_error", "the endpoint has a bug; its log says where")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _is_local(scope: Scope) -> bool:
    """Return whether the client is on this machine. One without an address is connected by a Unix socket."""
    if scope.get("client") is None:
        return True
    try:
        return ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False
