"""The parent process of the driver, with drivers that are a few lines: no Ray, no model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from patience import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process control")

SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.runtime.signals import catch_signals, exit_on_signals
from moray.engine.errors import SpecError, Problem
from moray.jobs.cli import main
from moray.jobs.driver.driver_process import run_driver

def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)

def drive(link):
    Path("driver").write_text(str(os.getpid()))
{body}

exit_on_signals()
sys.exit(run_driver(drive))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command whose driver has this body, in a process group of its own.

    before: a program that execs it
    """
    started: list[subprocess.Popen[str]] = []

    def begin(body: str, *before: str) -> subprocess.Popen[str]:
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        started.append(
            subprocess.Popen(
                [*before, sys.executable, "-c", SCRIPT.format(body=lines)],
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(what: Callable[[], object]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


CATCH = """
signals = []
with catch_signals(lambda name: (signals.append(name), Path(name).touch())):
    Path("ready").touch()
    while len(signals) < 2:
        time.sleep(0.01)
    time.sleep(0.3)  # one that counts twice comes now
print(*signals)
return 7
"""


@pytest.mark.parametrize("to", ["command", "driver", "group"])
def test_a_signal_counts_once_whoever_gets_it(tmp_path: Path, start: Start, to: str) -> None:
    command = start(CATCH)
    wait_for((tmp_path / "ready").exists)
    for number in (signal.SIGINT, signal.SIGTERM):
        if to == "group":
            os.killpg(command.pid, number)
        else:
            os.kill(command.pid if to == "command" else int((tmp_path / "driver").read_text()), number)
        wait_for((tmp_path / number.name).exists)
    output, errors = command.communicate(timeout=PATIENCE_S)
    assert (command.returncode, output, errors) == (7, "SIGINT SIGTERM\n", "")


def test_before_a_run_is_there_a_death_ends_the_command(start: Start) -> None:
    output, errors = start("os.kill(os.getpid(), signal.SIGSEGV)").communicate(timeout=PATIENCE_S)
    assert (output, errors) == ("", "The driver was killed by SIGSEGV.\n")


RESTARTED = """
began_s = 12.5 if link.restart is None else link.restart.began_s
link.report_run("out", "run", is_retry=False, num_committed=0, max_restarts=2, spec="{}", began_s=began_s)
if link.restart is None or link.restart.number < 2:
    os.kill(os.getpid(), signal.SIGKILL)
print(link.restart.number, link.restart.began_s)
return 0
"""


def test_every_driver_is_told_when_the_first_run_began(start: Start) -> None:
    command = start(RESTARTED)
    output, errors = command.communicate(timeout=PATIENCE_S)
    assert (command.returncode, output) == (0, "2 12.5\n"), errors


BUSY = """
from moray.batch.runtime.ray_watch import RayWatchByParent
link.report_run("out", "run", is_retry=False, num_committed=0, max_restarts=1, spec="{}", began_s=0.0)
if link.restart is None:
    with RayWatchByParent(link).starting(Path("ray")):
        raise Exception("The current node timed out during startup. This could happen because")
print(link.restart.reason)
return 0
"""


def test_a_ray_that_does_not_come_up_in_time_is_started_again(start: Start) -> None:
    command = start(BUSY)
    output, errors = command.communicate(timeout=PATIENCE_S)
    expected = "the raylet of the local Ray did not come up in time while that started\n"
    assert (command.returncode, output) == (0, expected), errors


def test_exit_codes_are_the_drivers(start: Start) -> None:
    for body, code in (
        ("return 0", 0),
        ("sys.exit(5)", 5),
        ("link.report_exit(3); os.kill(os.getpid(), signal.SIGABRT)", 3),  # at its end, when all is done
        ("os._exit(0)", 1),  # without a report
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143),
    ):
        command = start(body)
        command.communicate(timeout=PATIENCE_S)
        assert command.returncode == code, body


def test_what_a_driver_leaves_behind_is_ended(tmp_path: Path, start: Start) -> None:
    """Processes in sessions of their own whose parents are dead are ended too."""
    body = """
subprocess.run(["bash", "-c", "setsid sleep 1000 & echo $! > orphan"], check=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = start(body)
    command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 1
    assert not Path(f"/proc/{(tmp_path / 'orphan').read_text().strip()}").exists()


BEFORE = """
sleep 1000 & echo $! > early
(until [ -e go ]; do sleep 0.01; done; sleep 1000 & echo $! > late.tmp; mv late.tmp late) &
exec "$@"
"""


def test_what_was_there_before_the_command_is_left_alone(tmp_path: Path, start: Start) -> None:
    """Children of a shell that has become the command, and orphans of theirs, which are the command's by adoption."""
    body = """
Path("go").touch()
wait_for("late")
Path("own").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = start(body, "bash", "-c", BEFORE, "bash")
    assert command.wait(PATIENCE_S) == 1
    pids = {name: int((tmp_path / name).read_text()) for name in ("early", "late", "own")}
    try:
        assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == ["early", "late"]
    finally:
        for name in ("early", "late"):
            with suppress(ProcessLookupError):
                os.kill(pids[name], signal.SIGKILL)


def test_the_folder_of_its_ray_is_removed_and_no_other(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of another container may have the same id, and a folder in the same parent."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    body = """
from moray.batch.runtime.ray_choice import make_folder
make_folder(Path.cwd(), link.token)
Path(f"moray-{os.getpid()}-12345678").mkdir()
make_folder(Path.cwd())
Path("made").write_text(str(len(list(Path.cwd().glob("moray-*")))))
return 0
"""
    assert start(body).wait(PATIENCE_S) == 0
    assert (tmp_path / "made").read_text() == "3" and len(list(tmp_path.glob("moray-*"))) == 2
    assert (tmp_path / f"moray-{(tmp_path / 'driver').read_text()}-12345678").exists()


def test_a_driver_ends_with_its_parent(tmp_path: Path, start: Start) -> None:
    body = """
signals = []
def take(name):
    signals.append(name)
    Path("signals").write_text(" ".join(signals))
with catch_signals(take):
    Path("ready").touch()
    wait_for("go")
return 0
"""
    command = start(body)
    wait_for((tmp_path / "ready").exists)
    command.kill()
    wait_for(lambda: (tmp_path / "signals").exists() and (tmp_path / "signals").read_text() == "SIGKILL SIGKILL")
    (tmp_path / "go").touch()


def test_the_parent_is_small(start: Start, tmp_path: Path) -> None:
    body = """
import torch
Path("ready").touch()
wait_for("go")
return 0
"""
    command = start(body)
    wait_for((tmp_path / "ready").exists)
    maps = Path(f"/proc/{command.pid}/maps").read_text()
    assert "torch" not in maps and "_raylet" not in maps and "arrow" not in maps
    (rss,) = [
        line.split()[1] for line in Path(f"/proc/{command.pid}/status").read_text().splitlines() if "VmRSS" in line
    ]
    assert int(rss) < 40_000, "kB"
    (tmp_path / "go").touch()
    command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0
