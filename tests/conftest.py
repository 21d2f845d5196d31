"""Fixtures that several folders share."""

import gc
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hold import Hold
from ports import free_port
from tiny_checkpoints import TINY, write

from moray.kernels.cache_root import cache_root

# Tests that put moray's caches elsewhere do not mean that kernels are compiled again.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_root() / "numba"))

# Ray reads this when it is imported; the jobs that tests run as processes of their own start without it.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Ray gives its workers niceness 15: beside other tests on the same cores a job would hardly move.
os.environ.update(RAY_worker_niceness="0")

# Triton settles how its own library runs when it is imported, which torch._dynamo does long before a kernel's test is
# collected: without this, `pytest tests/kernels` alone would find half of it compiled for a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The shapes here are too small to share among threads, which only wait for each other.
torch.set_num_threads(1)

# A busy machine is no failed test.
hypothesis.settings.register_profile("moray", deadline=None)
hypothesis.settings.load_profile("moray")


def pytest_collection_finish() -> None:
    """Hide all that the imports have made from the garbage collector, which would visit it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random fp32 checkpoint of each architecture, by model_type."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {config["model_type"]: write(root / config["model_type"], config) for config in TINY}


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """Holds the jobs in tmp_path that are started from now on."""
    return Hold(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server of our own, a process beside the tests."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the S3 server ended before it began"
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("the S3 server did not start in 30 s")


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A boto3 client of that server; the environment points there too."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@pytest.fixture
def bucket(s3: Any) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name
