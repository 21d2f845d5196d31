"""Checks around Ray: addresses that answer and do not, ports, old sessions, proxies, paths of sockets."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest
from doctor_run import ask_section
from patience import PATIENCE_S
from ports import free_port
from ray_cluster import TOKEN, RayCluster

from moray.batch.runtime.ray_choice import RayChoice
from moray.jobs.doctor import ray_cluster, sessions
from moray.jobs.doctor.finding import Finding, Subject, Verdict
from moray.jobs.doctor.processes import is_free, listener


@pytest.mark.slow
def test_a_cluster_that_is_there(cluster: RayCluster) -> None:
    lets_in = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    verdict, words = ask_section("Ray", address=cluster.gcs_address, **lets_in).verdict_and_text("Ray", "cluster")
    assert verdict == "ok" and words.startswith(f"{cluster.gcs_address}: Ray {version('ray')}, Python 3.")
    answer = ask_section("Ray", RAY_ADDRESS=cluster.gcs_address, **lets_in | {"RAY_AUTH_TOKEN": "b" * 64})
    verdict, words = answer.verdict_and_text("Ray", "cluster")
    assert verdict == "problem" and "does not take this machine's token" in words
    verdict, words = ask_section("Ray", address=cluster.gcs_address).verdict_and_text("Ray", "cluster")
    assert verdict == "problem" and "asks for a token" in words and "| set RAY_AUTH_MODE=token, and " in words
    assert cluster.gcs_address.partition(":")[2] in answer.verdict_and_text("Ray", "other clusters")[1]


@pytest.mark.slow
def test_a_cluster_of_another_version(cluster: RayCluster) -> None:
    code = """
import sys
from moray.jobs.doctor import ray_cluster
ray_cluster.metadata.version = lambda name: "2.59.0"
print(ray_cluster._versions(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, cluster.gcs_address],
        env=cluster.environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (
        "Verdict.PROBLEM" in done.stdout and f"Ray {version('ray')}" in done.stdout and "here Ray 2.59.0" in done.stdout
    )


@pytest.fixture
def server() -> Iterator[int]:
    """Return a port on which something listens that is not Ray."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        serving = Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield server.server_port
        server.shutdown()
        serving.join()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        pytest.param("http://127.0.0.1:8265", "a dashboard's address", marks=pytest.mark.slow),
        ("127.0.0.1:1", "no Ray cluster answers"),
        pytest.param("no.such.host.invalid:6379", "no Ray cluster answers", marks=pytest.mark.slow),
        ("somewhere", "must be HOST:PORT of a Ray cluster's head"),
    ],
)
def test_addresses_that_lead_nowhere(address: str, words: str) -> None:
    for answer in (ask_section("Ray", address=address), ask_section("Ray", RAY_ADDRESS=address)):
        verdict, text = answer.verdict_and_text("Ray", "cluster")
        assert (answer.code, verdict) == (1, "problem") and words in text


def test_something_that_is_no_ray(server: int) -> None:
    verdict, words = ask_section("Ray", address=f"127.0.0.1:{server}").verdict_and_text("Ray", "cluster")
    assert verdict == "problem" and "is not the head of a Ray cluster" in words


def test_who_listens(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_free(server, "127.0.0.1") and is_free(free_port())
    assert listener(server).endswith(f"(process {os.getpid()})")
    monkeypatch.setattr(ray_cluster, "PORTS", {8000: ("moray serve", "moray serve --port NUMBER")})
    monkeypatch.setattr(ray_cluster, "is_free", lambda port: False)
    monkeypatch.setattr(ray_cluster, "listener", lambda _: listener(server))
    (found,) = ray_cluster.ports(Subject())
    assert found.verdict is Verdict.WARNING and f"(process {os.getpid()})" in found.value


def test_a_long_path_of_temporary_files(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 60)
    folder.mkdir()
    verdict, words = ask_section("Disk", TMPDIR=str(folder)).verdict_and_text("Disk", "Ray's folder")
    assert verdict == "warning" and "which leaves 20 for the folder" in words and "a path of at most 20 bytes" in words


def test_files_that_were_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, ours = tmp_path / "ray/session_2026-01-01_old", tmp_path / "moray-old"
    running, new = tmp_path / "ray/session_2026-01-02_running", tmp_path / "ray/session_2026-01-03_new"
    old_s = time.time() - 3600
    for folder in (cluster, ours / "session_2026-01-01", running, new):
        folder.mkdir(parents=True)
        (folder / "gcs_server.out").write_bytes(b"a" * 100_000)
    for folder in (cluster, ours, running):
        os.utime(folder, (old_s, old_s))
    (tmp_path / "moray-no-ray").mkdir()
    (tmp_path / "ray/session_latest").symlink_to(cluster)
    daemon = subprocess.Popen([sys.executable, "-c", "input()", str(running)], stdin=subprocess.PIPE)
    try:
        while str(running) not in Path(f"/proc/{daemon.pid}/cmdline").read_text():
            time.sleep(0.01)
        assert sessions.dead_folders(tmp_path) == [cluster, ours]
    finally:
        daemon.communicate(b"\n")
    monkeypatch.setattr(sessions, "choose_ray", lambda _: RayChoice(parent=tmp_path))
    assert _one(sessions.leftovers(Subject())).verdict is Verdict.OK
    monkeypatch.setattr(sessions, "WARN_BYTES", 50_000)
    found = _one(sessions.leftovers(Subject()))
    assert found.verdict is Verdict.WARNING and found.fix == f"rm -r {cluster} {running} {ours}"


def _one(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


@pytest.mark.slow
def test_proxies_and_variables() -> None:
    bare = dict.fromkeys(("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"), "")
    answer = ask_section(
        "Ray", **bare | {"http_proxy": "http://127.0.0.1:1", "RAY_DATA_X": "1", "RAY_AUTH_TOKEN": "s3"}
    )
    verdict, words = answer.verdict_and_text("Ray", "proxies")
    assert verdict == "warning" and "no_proxy lacks localhost, 127.0.0.1" in words
    verdict, words = answer.verdict_and_text("Ray", "variables")
    assert verdict == "warning" and "unset RAY_DATA_X," in words and "s3" not in words
    answer = ask_section("Ray", **bare | {"http_proxy": "http://127.0.0.1:1", "no_proxy": "localhost,127.0.0.1"})
    assert answer.verdict_and_text("Ray", "proxies") == ("ok", "http_proxy, not for this machine | None")
