"""Error messages for clusters that cannot be used, without a cluster."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from ports import free_port

from moray.engine.errors import UserError
from moray.jobs.clusters.ray_jobs import RayCluster
from moray.jobs.clusters.submission import next_id
from moray.jobs.commands.submit import read_variable


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """Start an HTTP server that answers each request with the next item of the list."""
    answer: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer[-1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", answer
        http.shutdown()
        thread.join()


def test_no_cluster() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"^no Ray cluster answers at {address}. It must be the head's dashboard"):
        RayCluster(address)


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://", "auto"])
def test_no_address_of_a_dashboard(address: str) -> None:
    with pytest.raises(
        UserError, match=r"^--address must be that of the cluster's dashboard, such as http://head:8265"
    ):
        RayCluster(address)


def test_something_else_than_ray(server: tuple[str, list[bytes]]) -> None:
    address, answer = server
    for text in (b"<html>", b"{}", b"[1]"):
        answer.append(text)
        with pytest.raises(UserError, match=f"^what answers at {address} is not a Ray dashboard"):
            RayCluster(address)


def test_another_ray(server: tuple[str, list[bytes]]) -> None:
    address, answer = server
    answer.append(json.dumps({"ray_version": "2.9.3"}).encode())
    with pytest.raises(UserError, match=f"^the cluster at {address} runs Ray 2.9.3; this moray needs 2.60.x there$"):
        RayCluster(address)


def test_ids_of_submissions_are_never_used_twice() -> None:
    first = next_id("Sums & more!", "s3://b/out", [])
    assert first == "Sums-more-a23f8375-1"
    assert next_id("sums", "s3://b/out", [first, "x-9", "named-by-hand"]) == "sums-a23f8375-10"
    assert next_id("!!!", "s3://b/other", []).startswith("job-")


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "1=2")
    assert read_variable("HERE") == ("HERE", "1=2")
    assert read_variable("A=b=c") == ("A", "b=c")
    assert read_variable("A=") == ("A", "")
    with pytest.raises(UserError, match=r"^--env NOWHERE: there is no such variable here; write NOWHERE=VALUE$"):
        read_variable("NOWHERE")
