"""Tests of model.path on the hub and on Google Cloud Storage, with real clients and a small server of our own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from uploaded_model import assert_same_files, refusal, write_model

import moray.engine.checkpoint.model_source
from moray.engine.checkpoint.model_source import ModelSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "some-model")


@pytest.fixture
def store(model: Path) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).parents[1] / "store_server.py"), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


HUB = """
import json, sys
from moray.engine.errors import UserError
from moray.engine.checkpoint.model_source import ModelSource
try:
    folder = ModelSource(sys.argv[1])
    read = folder.read("merges.txt", 5, 2).decode()
    answer = [folder.name, folder.revision, folder.files(), read, str(folder.download())]
except UserError as error:
    answer = f"{type(error).__name__}: {error}"
print(json.dumps(answer))
"""


def hub(path: str, endpoint: str, home: Path) -> Any:
    """Read the hub in a separate process: the hub's client reads its environment once, when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    answer = subprocess.run([sys.executable, "-c", HUB, path], env=environment, capture_output=True, check=True)
    return json.loads(answer.stdout)


@pytest.mark.parametrize("path", ["hf://org/model", f"hf://org/model@{COMMIT}"])
def test_the_hub(store: str, model: Path, tmp_path: Path, path: str) -> None:
    name, revision, files, read, copy = hub(path, store, tmp_path / "home")
    assert (name, revision, read) == ("model", COMMIT, "is")
    assert files == {path.name: path.stat().st_size for path in model.iterdir()}
    assert Path(copy).is_relative_to(tmp_path / "home") and Path(copy).name == COMMIT
    assert_same_files(Path(copy), model)


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("hf://org/gone", "CheckpointError", "does not exist, or is private: then set HF_TOKEN"),
        ("hf://org/gated", "CheckpointError", "is gated; accept its terms on its page and set HF_TOKEN"),
        ("hf://org/model@dev", "CheckpointError", "hf://org/model@dev: the repository has no such revision"),
        ("hf://org/failing", "NodeError", "cannot be read from the hub; check the network and HF_ENDPOINT"),
    ],
)
def test_the_hub_says_no(store: str, tmp_path: Path, path: str, kind: str, reason: str) -> None:
    answer = hub(path, store, tmp_path)
    assert answer.startswith(f"{kind}: ") and reason in answer


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    answer = hub("hf://org/model", "http://127.0.0.1:9", tmp_path)
    assert "NodeError: hf://org/model@main cannot be read from the hub; check the network" in answer


def test_google_cloud_storage(store: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", store)
    monkeypatch.setattr(moray.engine.checkpoint.model_source, "CHUNK_BYTES", 1000)
    folder = ModelSource("gs://anonymous@b/models/a")
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert_same_files(folder.download(tmp_path / "cache"), model)


@pytest.mark.parametrize(
    ("path", "reason"), [("b/gone", "it does not exist, or is empty"), ("forbidden/models/a", "no permission")]
)
def test_google_cloud_storage_says_no(store: str, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", store)
    assert reason in refusal(f"gs://anonymous@{path}")


def test_s3_without_permission(s3: Any, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    assert "no permission; check the credentials in the environment" in refusal("s3://forbidden/model")
