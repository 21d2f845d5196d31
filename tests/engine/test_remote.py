"""model.path as a folder, on S3, on Google Cloud Storage and on the hub: real clients, real servers on this machine."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import engine.remote
from engine.download_cache import check_room, locked
from engine.errors import CheckpointError
from engine.remote import ModelFolder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {
    "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of two files, with tokenizer files, and with things that nobody needs."""
    folder = tmp_path / "some-model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    for name in (
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
        "pytorch_model.bin",
        "other.onnx",
    ):
        (folder / name).write_text(f"this is {name}")
    where = {}
    for i in (1, 2):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({f"w{i}": torch.full((1000 * i,), float(i))}, folder / file)
        where[f"w{i}"] = file
    (folder / "consolidated.safetensors").write_bytes(b"not in the index")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def upload(s3: Any, bucket: str, folder: Path, prefix: str = "models/some-model") -> str:
    for path in folder.iterdir():
        s3.upload_file(str(path), bucket, f"{prefix}/{path.name}")
    return f"s3://{bucket}/{prefix}"


def assert_same_files(copy: Path, folder: Path) -> None:
    assert {path.name for path in copy.iterdir() if not path.name.startswith(".")} == NEEDED
    for name in NEEDED:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name


def refusal(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelFolder(path).files()
    return str(caught.value)


# A folder here


def test_a_folder_is_used_where_it_is(model: Path) -> None:
    folder = ModelFolder(str(model))
    assert (folder.name, folder.revision, folder.download()) == ("some-model", None, model)
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert folder.read("merges.txt", 8, 100) == b"merges.txt"
    assert folder.weight_files() == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_relative_folder_and_the_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    monkeypatch.setenv("HOME", str(model.parent))
    assert ModelFolder(".").name == ModelFolder("~/some-model").name == "some-model"
    assert ModelFolder("~/some-model").download() == model


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone", r"gone does not exist \(looked for from "),
        ("some-model/config.json", "is a file; model.path must name the folder it is in"),
        (".", "holds no checkpoint: no config.json, only nothing"),
        ("ftp://host/model", "must be a folder, s3://"),
        ("hf://model", "must be a folder, s3://"),
        ("s3://", "must be a folder, s3://"),
    ],
)
def test_what_is_no_folder(model: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.chdir(model.parent)
    with pytest.raises(CheckpointError, match=reason):
        ModelFolder(path).files()


def test_pickles_alone_are_refused_before_a_download(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin.*never from pickles"):
        ModelFolder(str(model)).download()


# S3


def test_s3_is_read_in_place(s3: Any, bucket: str, model: Path) -> None:
    folder = ModelFolder(upload(s3, bucket, model) + "/")
    s3.put_object(Bucket=bucket, Key="models/some-model/onnx/config.json", Body=b"{}")
    assert (folder.name, folder.revision) == ("some-model", None)
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert folder.read("merges.txt", 8, 100) == b"merges.txt"


def test_s3_at_the_root_of_a_bucket_and_with_odd_names(s3: Any, bucket: str, model: Path) -> None:
    upload(s3, bucket, model, prefix="my models/a+b%20?")
    assert ModelFolder(f"s3://{bucket}/my models/a+b%20?").read("merges.txt", 0, 4) == b"this"
    s3.put_object(Bucket=bucket, Key="config.json", Body=b"{}")
    assert ModelFolder(f"s3://{bucket}").files() == {"config.json": 2}


def test_s3_is_downloaded_once(
    s3: Any, bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine.remote, "PIECE_BYTES", 1000)  # several pieces a file
    url, seen = upload(s3, bucket, model), list[tuple[int, int]]()
    copy = ModelFolder(url).download(progress=lambda done, total: seen.append((done, total)))
    assert copy.is_relative_to(tmp_path / "cache" / "moray")
    assert_same_files(copy, model)
    total = sum((model / name).stat().st_size for name in NEEDED)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)

    written = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert ModelFolder(url).download() == copy
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir() if p.name != ".lock"} == {
        name: time for name, time in written.items() if name != ".lock"
    }


def test_only_what_lacks_is_fetched_again(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    copy = ModelFolder(url).download(tmp_path / "cache")
    kept = (copy / "model-00002-of-00002.safetensors").stat().st_mtime_ns
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (copy / "config.json").unlink()
    fetched: list[int] = []
    assert ModelFolder(url).download(tmp_path / "cache", lambda done, total: fetched.append(done)) == copy
    assert_same_files(copy, model)
    assert (copy / "model-00002-of-00002.safetensors").stat().st_mtime_ns == kept
    assert len(fetched) == 2


def test_a_changed_source_is_another_folder(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    first = ModelFolder(url).download(tmp_path / "cache")
    (model / "merges.txt").write_text("that is merges.txt")  # of the same size
    time.sleep(1.1)  # S3 tells times in seconds
    second = ModelFolder(upload(s3, bucket, model)).download(tmp_path / "cache")
    assert (first / "merges.txt").read_text() == "this is merges.txt"
    assert_same_files(second, model)


def test_a_source_that_changes_while_it_is_fetched(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    folder = ModelFolder(upload(s3, bucket, model))
    folder.files()
    s3.put_object(Bucket=bucket, Key="models/some-model/merges.txt", Body=b"longer than it was before")
    with pytest.raises(CheckpointError, match=r"merges\.txt changed while it was fetched: it had 18 bytes"):
        folder.download(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("merges.txt"))


DOWNLOAD = """
import os, sys
from pathlib import Path
import engine.remote
url, cache, die_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
engine.remote.PIECE_BYTES = 1000
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == die_after:
        os.kill(os.getpid(), 9)
print(engine.remote.ModelFolder(url).download(cache, progress))
"""


def start_download(url: str, cache: Path, die_after: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", DOWNLOAD, url, str(cache), str(die_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    copies = [process.communicate()[0].strip() for process in [start_download(url, tmp_path / "c") for _ in range(2)]]
    assert copies[0] == copies[1]
    assert_same_files(Path(copies[0]), model)
    assert not list(Path(copies[0]).glob(".*.part"))


def test_a_killed_download_goes_on(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    killed = start_download(url, tmp_path / "c", die_after=8)
    killed.communicate()
    assert killed.returncode == -9
    (folder,) = (tmp_path / "c" / "models").iterdir()
    whole = {path.name for path in folder.iterdir() if path.name in NEEDED}
    assert whole and whole != NEEDED, "some files were there at the kill, and some not"
    assert list(folder.glob(".*.part")), "and one was half there, under another name"
    assert_same_files(ModelFolder(url).download(tmp_path / "c"), model)


def test_a_download_waits_for_another(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url, done = upload(s3, bucket, model), threading.Event()
    copy = ModelFolder(url).download(tmp_path / "c")
    waiting = threading.Thread(target=lambda: (ModelFolder(url).download(tmp_path / "c"), done.set()))
    with locked(copy):
        waiting.start()
        assert not done.wait(0.5)
    waiting.join(30)
    assert done.is_set()


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("models/gone", "it does not exist, or is empty"),
        ("models", r"holds no checkpoint: no config\.json, only nothing"),
    ],
)
def test_s3_without_a_checkpoint(s3: Any, bucket: str, model: Path, prefix: str, reason: str) -> None:
    upload(s3, bucket, model)
    with pytest.raises(CheckpointError, match=reason):
        ModelFolder(f"s3://{bucket}/{prefix}").files()


def test_s3_without_the_bucket(s3: Any) -> None:
    assert "there is no such bucket" in refusal("s3://no-such-bucket-here/model")


def test_s3_without_permission(s3: Any, bucket: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    assert "no permission; check the credentials in the environment" in refusal("s3://forbidden/model")


def test_s3_without_a_network(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "it cannot be reached; check the network and the endpoint" in refusal("s3://bucket/model")


def test_a_cache_that_cannot_be_written(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory; XDG_CACHE_HOME chooses another"):
        ModelFolder(upload(s3, bucket, model)).download(tmp_path / "file")


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs 1,048,576\.0 GiB, its disk has"):
        check_room(tmp_path, 2**50)


# The hub and Google Cloud Storage, from one small server


@pytest.fixture
def store(model: Path) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).parents[1] / "store_server.py"), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


HUB = """
import json, sys
from engine.errors import CheckpointError
from engine.remote import ModelFolder
try:
    folder = ModelFolder(sys.argv[1])
    read = folder.read("merges.txt", 5, 2).decode()
    answer = [folder.name, folder.revision, folder.files(), read, str(folder.download())]
except CheckpointError as error:
    answer = str(error)
print(json.dumps(answer))
"""


def hub(path: str, endpoint: str, home: Path) -> Any:
    """What a process of its own sees there: the hub's client reads its environment once, when imported."""
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
    ("path", "reason"),
    [
        ("hf://org/gone", "does not exist, or is private: then set HF_TOKEN"),
        ("hf://org/gated", "is gated; accept its terms on its page and set HF_TOKEN"),
        ("hf://org/model@dev", "hf://org/model@dev: the repository has no such revision"),
        ("hf://org/failing", "cannot be read from the hub; check the network and HF_ENDPOINT"),
    ],
)
def test_the_hub_says_no(store: str, tmp_path: Path, path: str, reason: str) -> None:
    assert reason in hub(path, store, tmp_path)


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    answer = hub("hf://org/model", "http://127.0.0.1:9", tmp_path)
    assert "hf://org/model@main cannot be read from the hub; check the network" in answer


def test_google_cloud_storage(store: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", store)
    monkeypatch.setattr(engine.remote, "PIECE_BYTES", 1000)
    folder = ModelFolder("gs://anonymous@b/models/a")
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert_same_files(folder.download(tmp_path / "cache"), model)


@pytest.mark.parametrize(
    ("path", "reason"), [("b/gone", "it does not exist, or is empty"), ("forbidden/models/a", "no permission")]
)
def test_google_cloud_storage_says_no(store: str, monkeypatch: pytest.MonkeyPatch, path: str, reason: str) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", store)
    assert reason in refusal(f"gs://anonymous@{path}")
