"""A TCP proxy in front of an object store that fails as real ones do: errors, slowness, connections that are cut."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlparse

BODY = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are away</Message></Error>"
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
CUT_AFTER = 2000  # bytes of a request: headers and some of the body


class StoreProxy:
    """What happens to requests from now on; all of it may be changed while others run.

    is_away:  each request is answered by 500
    delay_s:  before each answer
    cuts:     so many uploads of parts more are cut off in the middle
    """

    def __init__(self, store: str) -> None:
        self._store = urlparse(store)
        self.is_away = False
        self.delay_s = 0.0
        self.cuts = 0
        self.refused = self.cut = 0  # requests so far
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection((self._store.hostname, self._store.port)) as store, suppress(OSError):
            threading.Thread(target=self._answer, args=(store, client), daemon=True).start()
            left: int | None = None  # bytes of the request until it is cut
            while data := client.recv(65536):
                if request := REQUEST.match(data):
                    if self.is_away:
                        return self._refuse(client)
                    left = CUT_AFTER if self._takes_cut(*request.groups()) else None
                if left is not None and len(data) >= left:
                    store.sendall(data[:left])
                    self.cut += 1
                    return
                left = None if left is None else left - len(data)
                store.sendall(data)

    def _takes_cut(self, method: bytes, path: bytes) -> bool:
        wanted = self.cuts > 0 and method == b"PUT" and b"/part-" in path
        self.cuts -= wanted
        return wanted

    def _refuse(self, client: socket.socket) -> None:
        self.refused += 1
        client.sendall(ERROR)
        client.settimeout(0.2)
        while client.recv(65536):  # what is still on its way; closing before would take the answer back
            pass

    def _answer(self, store: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := store.recv(65536):
                time.sleep(self.delay_s)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


@contextmanager
def store_proxy(store: str) -> Iterator[StoreProxy]:
    proxy = StoreProxy(store)
    try:
        yield proxy
    finally:
        proxy.close()
