"""A proxy in front of an object store that fails as real ones do: errors, slowness, connections that are cut."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are away</Message></Error>"


class StoreProxy:
    """What happens to requests from now on; all of it may be changed while others run.

    is_away:  each request is answered by 500
    delay_s:  before each answer
    cuts:     so many uploads of parts more are cut off in the middle of their body
    """

    def __init__(self, store: str) -> None:
        self.store = urlparse(store).netloc
        self.is_away = False
        self.delay_s = 0.0
        self.cuts = 0
        self.refused = self.cut = self.served = 0  # requests so far
        self._lock = threading.Lock()

    def takes_cut(self, method: str, path: str) -> bool:
        with self._lock:
            if self.cuts and method == "PUT" and "/part-" in path:
                self.cuts -= 1
                self.cut += 1
                return True
            return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: StoreProxy

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if self.proxy.takes_cut(self.command, self.path):
            return self._cut(length)
        body = self.rfile.read(length)
        time.sleep(self.proxy.delay_s)
        if self.proxy.is_away:
            self.proxy.refused += 1
            return self._answer(500, {}, ERROR)
        upstream = http.client.HTTPConnection(self.proxy.store, timeout=60)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            self.proxy.served += 1
            self._answer(answer.status, dict(answer.headers), answer.read())
        finally:
            upstream.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _cut(self, length: int) -> None:
        """Half of the body goes through, then both connections are gone."""
        half = self.rfile.read(length // 2)
        host, port = self.proxy.store.split(":")
        with socket.create_connection((host, int(port))) as upstream:
            head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
            upstream.sendall(f"PUT {self.path} HTTP/1.1\r\n{head}\r\n".encode() + half)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def store_proxy(store: str) -> Iterator[tuple[StoreProxy, str]]:
    """The proxy and its address."""
    proxy = StoreProxy(store)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # clients go as they like
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
