"""The lease: one run at a time, as long as the run is alive."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moray.batch.output.folder import OutputFolder
from moray.batch.output.lease import LEASE, Holder, hold_lease
from moray.engine.errors import OutputError

HOLD = """
import sys, time
from moray.batch.output.folder import OutputFolder
from moray.batch.output.lease import hold_lease
with hold_lease(OutputFolder(sys.argv[1]), "first", print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    return OutputFolder(str(tmp_path))


def notes(folder: OutputFolder, run: str = "second", expiry_s: float = 0.5) -> list[str]:
    """Return the messages that a run gets until it holds the lease."""
    messages: list[str] = []
    with hold_lease(folder, run, messages.append, expiry_s=expiry_s):
        content = folder.read(LEASE)
        assert content is not None and json.loads(content)["run"] == run
    assert folder.read(LEASE) is None, "it is given back"
    return messages


def leave(folder: OutputFolder, **fields: object) -> None:
    """Write the lease of a run on another machine."""
    values = {"run": "first", "host": "elsewhere", "pid": 7, "started": "123", "beat": 3}
    folder.write(LEASE, json.dumps(values | fields).encode())


def test_an_empty_folder_is_free(folder: OutputFolder) -> None:
    assert notes(folder) == []


def test_a_process_on_this_machine_is_refused_while_it_lives(folder: OutputFolder) -> None:
    command = [sys.executable, "-c", HOLD, folder.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"is being written by run first \(process {other.pid} on "):
            notes(folder)
        other.kill()
        while Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        assert notes(folder) == [], "it is dead, if nobody has noticed yet"
        other.wait()
    leave(folder, host=Holder.this_process("").host, pid=other.pid)
    assert notes(folder) == []


def test_a_process_id_that_was_used_again_is_another_process(folder: OutputFolder) -> None:
    this_process = Holder.this_process("first")
    leave(folder, host=this_process.host, pid=this_process.pid, started="1")
    assert notes(folder) == []
    leave(folder, host=this_process.host, pid=this_process.pid, started=this_process.started)
    with pytest.raises(OutputError, match="is being written by"):
        notes(folder)


def test_a_machine_that_is_silent_has_lost_it(folder: OutputFolder) -> None:
    leave(folder)
    (message,) = notes(folder)
    assert "was left by run first (process 7 on elsewhere); waiting up to 0 s" in message


def test_a_machine_that_is_alive_is_refused(folder: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # this process, as if it were elsewhere
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        holder = hold_lease(folder, "first", print, heartbeat_s=0.05)
        holder.__enter__()
    began = time.monotonic()
    with pytest.raises(OutputError, match="run first"):
        notes(folder, expiry_s=20)
    assert time.monotonic() - began < 10, "its heartbeat was seen, the rest of the expiry time was not needed"
    holder.__exit__(None, None, None)
    assert folder.read(LEASE) is None


def test_what_is_no_lease_holds_nothing(folder: OutputFolder) -> None:
    for content in (b"", b"[]", b'{"run": 1}', b"\xff"):
        folder.write(LEASE, content)
        assert notes(folder) == []


def test_a_folder_that_is_gone_at_the_end_is_no_failure(tmp_path: Path) -> None:
    """A store that is away is no failure either."""
    with hold_lease(OutputFolder(str(tmp_path / "out")), "first", print):
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_bytes(b"")


def test_a_lease_that_another_run_took_is_not_given_back(folder: OutputFolder) -> None:
    with hold_lease(folder, "first", print):
        leave(folder, run="second")
    content = folder.read(LEASE)
    assert content is not None and json.loads(content)["run"] == "second"
