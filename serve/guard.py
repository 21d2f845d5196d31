"""Guard: what a request must pass before it reaches a route: size of headers and body, key. Nothing but answers
leaves it: an exception becomes one."""

import asyncio
import logging
import traceback
from collections.abc import MutableMapping
from ipaddress import ip_address
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Keys
from serve.openai.errors import ApiError

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 << 10
BODY_TIMEOUT_S = 60.0
OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/ready"})  # nothing of the model's is there
ANYBODY = "anybody"


class Guard:
    """ASGI middleware. The key's name is scope["state"]["key"] for what is behind it.

    keys:       without any configured, clients on this machine are served whatever they send
    is_public:  without keys, serve others too
    requests:   counts by path and status
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body_bytes: int, is_public: bool, requests: Counter) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._is_public = is_public
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._serve(scope, receive, count)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                await asyncio.Event().wait()  # for ever: it is here that a client's going is looked for
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(_watch(receive))
                await self._run(scope, replay, send)
                watching.cancel()
        except* _ClientGone:
            pass

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, and answer where it has a bug. Starlette would raise what its handlers handled."""
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            # Where, not what: what an exception says may be out of a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in %s %s\n%s", type(error).__name__, scope["method"], scope["path"], frames)
            if not has_started:
                await _BUG.response(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            raise ApiError(
                431, "headers_too_large", f"the headers have {size:,} bytes; this endpoint takes {MAX_HEADER_BYTES:,}"
            )
        if scope["path"] in OPEN_PATHS:
            return ANYBODY
        if not self._keys.are_configured:
            if not self._is_public and not _is_local(scope):
                raise ApiError(
                    403,
                    "no_keys",
                    "this endpoint has no keys and so serves its own machine only; whoever runs it can set keys_file, "
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
        """The whole body; not more of it than may be."""
        limit = self._max_body_bytes
        too_large = ApiError(413, "body_too_large", f"the body is larger than {limit:,} bytes, the limit here")
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
            raise ApiError(408, "body_timeout", f"the body did not come within {BODY_TIMEOUT_S:g} s") from None


class _ClientGone(Exception):
    """Stops what runs for the client."""


async def _watch(receive: Receive) -> None:
    """Serve's proxy stops the request of a client that has gone; other servers do not."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientGone


_BUG = ApiError(500, "internal_error", "the endpoint has a bug; its log says where")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _is_local(scope: Scope) -> bool:
    """Whether the client is on this machine. A client without an address came by a socket of this machine."""
    if scope.get("client") is None:
        return True
    try:
        return ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False
