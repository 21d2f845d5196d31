"""The clusters of this machine, and tokens that differ: found before a job starts anything."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from made_jobs import make_spec, write_input
from ray_cluster import TOKEN, TOKENS, RayNodes

from moray.batch.runtime.ray_choice import choose_ray, make_folder
from moray.batch.runtime.ray_clusters import TokenError, check_token, find_clusters


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@contextmanager
def raylet(folder: Path, address: str) -> Iterator[None]:
    """Yield a process with the command line of a raylet."""
    words = [f"--raylet_socket_name={folder}/session_2026-01-01_00-00-00_000000_1/sockets/raylet"]
    words += [f"--gcs-address={address}"]
    process = subprocess.Popen(["/ray/raylet", "-c", "read _", *words], executable="/bin/sh", stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.communicate()


def test_the_ray_of_another_job_is_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(find_clusters())
    with raylet(make_folder(tmp_path), "127.0.0.1:1"), raylet(tmp_path / "moray-lab", "127.0.0.1:2"):
        assert set(find_clusters()) - before == {"127.0.0.1:2"}


class Head(grpc.GenericRpcHandler):
    """A gRPC server that answers every call that has the token; every call where the token is None."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def service(self, details: Any) -> Any:
        def answer(_: bytes, context: Any) -> bytes:
            if (
                self._token is not None
                and ("authorization", f"Bearer {self._token}") not in details.invocation_metadata
            ):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def head(token: str | None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=(Head(token),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(10)


@pytest.mark.parametrize(
    ("theirs", "ours", "problem", "fix"),
    [
        (None, {}, None, ""),
        (None, {"RAY_AUTH_TOKEN": TOKEN}, None, ""),  # which Ray does not look at without the mode
        (None, {"RAY_AUTH_MODE": "disabled"}, None, ""),
        (TOKEN, TOKENS, None, ""),
        (TOKEN, {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": f" {TOKEN}\n"}, None, ""),
        (TOKEN, {}, "asks for a token, and RAY_AUTH_MODE is not token here", "set RAY_AUTH_MODE=token, and "),
        (TOKEN, TOKENS | {"RAY_AUTH_TOKEN": "b" * 64}, "does not take this machine's token", "set RAY_AUTH_TOKEN or "),
        (TOKEN, {"RAY_AUTH_MODE": "token"}, "and there is no token", "set RAY_AUTH_TOKEN or "),
        (None, TOKENS, "was started without a token: its workers", "set RAY_AUTH_MODE=disabled here, or start the "),
    ],
)
def test_tokens(
    theirs: str | None, ours: dict[str, str], problem: str | None, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with head(theirs) as address:
        if problem is None:
            assert choose_ray(address).address == address
            return
        with pytest.raises(TokenError) as caught:
            choose_ray(address)
    assert problem in caught.value.problem and address in str(caught.value) and caught.value.fix.startswith(fix)


def test_a_token_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(f"{TOKEN}\n")
    with head(TOKEN) as address:
        check_token(address)
        (tmp_path / "other").write_text("c" * 64)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
        with pytest.raises(TokenError, match="does not take this machine's token"):
            check_token(address)


@pytest.mark.slow
def test_a_token_for_a_cluster_that_has_none(tmp_path: Path) -> None:
    """Ray itself accepts the driver, and the job would end with actors that died."""
    write_input(tmp_path / "in/a.parquet", {"prompt": ["1 + 2 ="]})
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = RayNodes(Path(folder), "--include-dashboard=false", has_token=False)
        try:
            message = "was started without a token: its workers could not answer to this machine; set RAY_AUTH_MODE="
            doctor = nodes.moray("doctor", "--address", nodes.gcs_address, "--json", **TOKENS)
            assert doctor.returncode == 1 and message.partition(";")[0] in doctor.stdout
            serve = nodes.moray("serve", RAY_ADDRESS=nodes.gcs_address, **TOKENS)
            assert serve.returncode == 2 and message in serve.stderr
            (tmp_path / "job.yaml").write_text(make_spec(tmp_path).to_yaml())
            run = nodes.moray("run", str(tmp_path / "job.yaml"), "--address", nodes.gcs_address, **TOKENS)
            assert run.returncode == 2 and message in run.stderr and not (tmp_path / "out").exists()
            assert choose_ray(nodes.gcs_address).address == nodes.gcs_address
        finally:
            nodes.stop()
