"""Tests of model.path as a local folder and on S3, with a real client and a real server on this machine."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from uploaded_model import NEEDED, assert_same_files, refusal, write_model

import moray.engine.checkpoint.model_source
from moray.engine.checkpoint.download_cache import check_room, locked
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import CheckpointError, NodeError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "some-model")


def upload(s3: Any, bucket: str, folder: Path, prefix: str = "models/some-model") -> str:
    for path in folder.iterdir():
        s3.upload_file(str(path), bucket, f"{prefix}/{path.name}")
    return f"s3://{bucket}/{prefix}"


# A folder here


def test_a_folder_is_used_where_it_is(model: Path) -> None:
    folder = ModelSource(str(model))
    assert (folder.name, folder.revision, folder.download()) == ("some-model", None, model)
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert folder.read("merges.txt", 8, 100) == b"merges.txt"
    assert folder.weight_files() == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_relative_folder_and_the_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    monkeypatch.setenv("HOME", str(model.parent))
    assert ModelSource(".").name == ModelSource("~/some-model").name == "some-model"
    assert ModelSource("~/some-model").download() == model


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
        ModelSource(path).files()


def test_pickles_alone_are_refused_before_a_download(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin.*never from pickles"):
        ModelSource(str(model)).download()


# S3


def test_the_files_beside_the_weights_alone(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    assert ModelSource(str(model)).metadata_folder(tmp_path) == model
    copy = ModelSource(upload(s3, bucket, model)).metadata_folder(tmp_path)
    assert copy.parent == tmp_path
    names = ModelSource(str(model)).metadata_files()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {n: (model / n).read_bytes() for n in names}


def test_s3_is_read_in_place(s3: Any, bucket: str, model: Path) -> None:
    folder = ModelSource(upload(s3, bucket, model) + "/")
    s3.put_object(Bucket=bucket, Key="models/some-model/onnx/config.json", Body=b"{}")
    assert (folder.name, folder.revision) == ("some-model", None)
    assert folder.files() == {path.name: path.stat().st_size for path in model.iterdir()}
    assert folder.read("merges.txt", 5, 2) == b"is"
    assert folder.read("merges.txt", 8, 100) == b"merges.txt"


def test_s3_holds_half_an_upload(s3: Any, bucket: str, model: Path) -> None:
    url = upload(s3, bucket, model)
    here = ModelSource(str(model)).tensors()
    assert ModelSource(url).tensors() == {
        name: replace(one, file=f"{url}/{Path(one.file).name}") for name, one in here.items()
    }
    name = "model-00002-of-00002.safetensors"
    s3.put_object(Bucket=bucket, Key=f"models/some-model/{name}", Body=(model / name).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"^{url}/{name} is cut short or damaged: .* Fetch it again\.$"):
        ModelSource(url).tensors()


def test_s3_at_the_root_of_a_bucket_and_with_odd_names(s3: Any, bucket: str, model: Path) -> None:
    upload(s3, bucket, model, prefix="my models/a+b%20?")
    assert ModelSource(f"s3://{bucket}/my models/a+b%20?").read("merges.txt", 0, 4) == b"this"
    s3.put_object(Bucket=bucket, Key="config.json", Body=b"{}")
    assert ModelSource(f"s3://{bucket}").files() == {"config.json": 2}


def test_s3_is_downloaded_once(
    s3: Any, bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(moray.engine.checkpoint.model_source, "CHUNK_BYTES", 1000)  # several chunks a file
    url, seen = upload(s3, bucket, model), list[tuple[int, int]]()
    copy = ModelSource(url).download(progress=lambda done, total: seen.append((done, total)))
    assert copy.is_relative_to(tmp_path / "cache" / "moray")
    assert_same_files(copy, model)
    total = sum((model / name).stat().st_size for name in NEEDED)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)

    written = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert ModelSource(url).download() == copy
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir() if p.name != ".lock"} == {
        name: time for name, time in written.items() if name != ".lock"
    }


def test_only_what_lacks_is_fetched_again(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    copy = ModelSource(url).download(tmp_path / "cache")
    kept = (copy / "model-00002-of-00002.safetensors").stat().st_mtime_ns
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (copy / "config.json").unlink()
    fetched: list[int] = []
    assert ModelSource(url).download(tmp_path / "cache", lambda done, total: fetched.append(done)) == copy
    assert_same_files(copy, model)
    assert (copy / "model-00002-of-00002.safetensors").stat().st_mtime_ns == kept
    assert len(fetched) == 2


def test_a_changed_source_is_another_folder(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url = upload(s3, bucket, model)
    first = ModelSource(url).download(tmp_path / "cache")
    (model / "merges.txt").write_text("that is merges.txt")  # of the same size
    time.sleep(1.1)  # S3's times have a resolution of a second
    second = ModelSource(upload(s3, bucket, model)).download(tmp_path / "cache")
    assert (first / "merges.txt").read_text() == "this is merges.txt"
    assert_same_files(second, model)


def test_a_source_that_changes_while_it_is_fetched(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    folder = ModelSource(upload(s3, bucket, model))
    folder.files()
    s3.put_object(Bucket=bucket, Key="models/some-model/merges.txt", Body=b"longer than it was before")
    with pytest.raises(CheckpointError, match=r"merges\.txt changed while it was fetched: it had 18 bytes"):
        folder.download(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("merges.txt"))


DOWNLOAD = """
import os, sys
from pathlib import Path
import moray.engine.checkpoint.model_source
url, cache, die_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
moray.engine.checkpoint.model_source.CHUNK_BYTES = 1000
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == die_after:
        os.kill(os.getpid(), 9)
print(moray.engine.checkpoint.model_source.ModelSource(url).download(cache, progress))
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
    assert_same_files(ModelSource(url).download(tmp_path / "c"), model)


def test_a_download_waits_for_another(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    url, done = upload(s3, bucket, model), threading.Event()
    copy = ModelSource(url).download(tmp_path / "c")
    waiting = threading.Thread(target=lambda: (ModelSource(url).download(tmp_path / "c"), done.set()))
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
        ModelSource(f"s3://{bucket}/{prefix}").files()


def test_s3_without_the_bucket(s3: Any) -> None:
    assert "there is no such bucket" in refusal("s3://no-such-bucket-here/model")


def test_s3_without_a_network(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "it cannot be reached; check the network and the endpoint" in refusal("s3://bucket/model", NodeError)


def test_a_cache_that_cannot_be_written(s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NodeError, match="cannot be written: Not a directory; XDG_CACHE_HOME chooses another"):
        ModelSource(upload(s3, bucket, model)).download(tmp_path / "file")


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"needs 1,048,576\.0 GiB, its disk has"):
        check_room(tmp_path, 2**50)
