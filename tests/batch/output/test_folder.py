"""OutputFolder on a disk and in an object store."""

import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pyarrow import NativeFile
from small_disk import small_disk

from moray.batch.output.folder import TMP, OutputFolder, _writer
from moray.engine.errors import JobError, OutputError


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(str(tmp_path / "out"))
    folder.write("a.parquet", b"old")

    def broken(path: Path, target: Path) -> None:
        assert path.read_bytes() == b"new" and path.parent == tmp_path / "out" / TMP
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no space left"):
        folder.write("a.parquet", b"new")
    assert folder.read("a.parquet") == b"old"
    assert folder.names() == ["a.parquet"]


def test_a_durable_file_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), rename(self, to))[1])
    folder = OutputFolder(str(tmp_path))
    folder.write("a.parquet", b"x")
    assert [Path(step).name.split(".")[0] for step in done] == ["a", "rename", tmp_path.name]
    done.clear()
    folder.write("status.json", b"x", durable=False)
    assert done == ["rename"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    versions = [bytes([n]) * 200_000 for n in range(4)]
    folder.write("status.json", versions[0])
    over = threading.Event()

    def replace() -> None:
        for _ in range(25):
            for version in versions:
                folder.write("status.json", version, durable=False)
        over.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not over.is_set():
        assert folder.read("status.json") in versions
    writer.join()
    assert not list((tmp_path / TMP).iterdir())


def test_only_old_leavings_are_removed(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write("a", b"x")
    for name, age_s in (("old", 7200), ("new", 60)):
        path = tmp_path / TMP / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    folder.remove_abandoned()
    assert [path.name for path in (tmp_path / TMP).iterdir()] == ["new"]


def test_leavings_of_a_process_that_was_killed_are_removed_at_once(tmp_path: Path) -> None:
    """Remove what a killed process has left, and keep what a living one writes."""
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom moray.batch.output.folder import OutputFolder\n"
        "Path.rename = lambda self, to: os.kill(os.getpid(), 9)\n"
        "OutputFolder(sys.argv[1]).write('a.parquet', b'half')"
    )
    folder = OutputFolder(str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script, folder.path], check=False).returncode == -9
    (left,) = (tmp_path / TMP).iterdir()
    mine = left.with_name(f"b.parquet~{_writer()}~0")
    mine.write_bytes(b"being written")
    folder.remove_abandoned()
    assert list((tmp_path / TMP).iterdir()) == [mine] and folder.names() == []


def test_a_full_disk_is_named_and_keeps_no_half_of_a_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder = OutputFolder(str(disk.path / "out"))
        folder.publish("a.parquet", b"x" * 200_000)
        with pytest.raises(JobError) as error:
            folder.publish("b.parquet", b"x" * 2_000_000)
        where = re.escape(f"{folder.path}/b.parquet cannot be written: No space left on device")
        assert re.fullmatch(rf"{where}; its disk has [\d,]+ of 1,048,576 bytes free\. Make .*", str(error.value))
        assert folder.names() == ["a.parquet"] and not list((disk.path / "out" / TMP).iterdir())


def test_names_are_those_of_files_in_the_folder_itself(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    for name in ("b.parquet", "a.parquet", "_job/plan.json"):
        folder.write(name, b"x")
    assert folder.names() == ["a.parquet", "b.parquet"]
    assert OutputFolder(str(tmp_path / "nowhere")).names() == []
    assert OutputFolder(str(tmp_path / "nowhere")).read("a") is None


def test_an_object_store(bucket: str) -> None:
    folder = OutputFolder(f"s3://{bucket}/deep/out")
    assert (folder.is_local, folder.names(), folder.read("a")) == (False, [], None)
    folder.write("a.parquet", b"one")
    folder.write("a.parquet", b"two")
    folder.write("_job/plan.json", b"{}")
    folder.remove_abandoned()
    assert (folder.names(), folder.read("a.parquet")) == (["a.parquet"], b"two")


def test_why_a_folder_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    file = OutputFolder(str(tmp_path / "file"))
    for call in (file.names, lambda: file.read("a")):
        with pytest.raises(OutputError, match=r"/file is a file, or lies in one; the output of a job is a folder$"):
            call()
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match=rf"^{tmp_path}/a cannot be read: .* is a directory$"):
        OutputFolder(str(tmp_path)).read("a")


class LetsNobodyIn(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.usefixtures("s3")
def test_an_object_store_that_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), LetsNobodyIn) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OutputError, match=r"^s3://bucket/out cannot be read: .* AWS Error ACCESS_DENIED "):
            OutputFolder("s3://bucket/out").names()
        server.shutdown()


def test_a_file_that_an_object_store_replaces_while_it_is_read_is_read_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(f"s3://{bucket}/out")
    folder.write("status.json", b"old")
    opened = OutputFolder.open
    longer = [b"a longer one", b"one that is longer still"]

    def replace(self: OutputFolder, name: str) -> NativeFile:
        file = opened(self, name)
        if longer:
            self.write(name, longer.pop(0))
        return file

    monkeypatch.setattr(OutputFolder, "open", replace)
    assert folder.read("status.json") == b"one that is longer still"
    longer += [b"x" * n for n in range(100, 200)]
    with pytest.raises(OutputError, match="was replaced each of the 5 times it was read"):
        folder.read("status.json")
