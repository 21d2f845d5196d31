"""A connection to Ray leaves the process its signal handlers, and leaves no files on the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from held_steps import wait_for
from patience import PATIENCE_S

from moray.batch.runtime.ray_choice import RayChoice
from moray.batch.runtime.ray_session import ALARM_POLL_S, _explain_connection_error, _kept_signals, ray_session
from moray.engine.errors import JobError

SCRIPT = """
import json, os, signal
from moray.batch.runtime.ray_choice import choose_ray
from moray.batch.runtime.ray_session import ray_session
from moray.batch.runtime.signals import catch_signals

seen = []
with catch_signals(seen.append), ray_session(choose_ray(), print):
    import psutil  # which Ray brings along

    folders = len(os.listdir(os.environ["RAY_TMPDIR"]))
    daemons = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    os.kill(os.getpid(), signal.SIGTERM)
    alarm = signal.getitimer(signal.ITIMER_REAL)
    print(json.dumps({"seen": seen, "alarm": alarm, "daemons": daemons, "folders": folders}))
"""


@pytest.fixture(scope="module")
def session() -> dict[str, Any]:
    """Return what a session with a local Ray did to the process and started, once it has ended."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=bare | {"RAY_TMPDIR": folder},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return {**json.loads(done.stdout), "left": os.listdir(folder)}


def test_sigterm_is_ours_and_sets_no_alarm(session: dict[str, Any]) -> None:
    """Abseil's handler, which Ray installs, would abort the process three seconds later.

    An orderly end takes longer on a busy machine, and in a job with long rows.
    """
    assert (session["seen"], session["alarm"]) == (["SIGTERM"], [0.0, 0.0])


def test_a_session_keeps_its_files_in_one_folder_and_removes_it(session: dict[str, Any]) -> None:
    assert (session["folders"], session["left"]) == (1, [])


def test_a_session_starts_no_daemon_that_has_nothing_to_do(session: dict[str, Any]) -> None:
    """If Ray renames its daemons one day, those that are needed will be missing here."""
    started = "\n".join(session["daemons"])
    assert all(name in started for name in ("gcs_server", "raylet")), started
    assert not any(name in started for name in ("monitor.py", "dashboard.py")), started


INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path
from moray.batch.runtime.ray_choice import choose_ray
from moray.batch.runtime.ray_session import ray_session

folder = Path(os.environ["RAY_TMPDIR"])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background commands ignore it

def has_begun():
    try:
        return any(folder.glob("moray-*/session_*/logs/gcs_server.out"))
    except FileNotFoundError:  # a folder that only tried whether it can be written
        return False

def interrupt():
    while not has_begun():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

def commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            pass

threading.Thread(target=interrupt, daemon=True).start()
try:
    with ray_session(choose_ray(), print):
        print("started")
except KeyboardInterrupt:
    print(os.listdir(folder), [command for command in commands() if str(folder) in command])
"""


def test_a_start_that_is_broken_off_leaves_nothing_at_once() -> None:
    """Ray itself would end what it has started only when Python ends."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED], env=bare | {"RAY_TMPDIR": folder},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr
        assert os.listdir(folder) == []


def test_a_ray_that_does_not_come_up_in_time_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda wait_for_processes: None)
    folders: list[Path] = []

    def connect(address: str | None, folder: Path, on_report: Callable[[str], None]) -> None:
        folders.append(folder)
        if len(folders) < fails_until:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("moray.batch.runtime.ray_session._connect", connect)
    choice = RayChoice(None, tmp_path)
    fails_until, reports = 3, []
    with ray_session(choice, reports.append):
        assert list(tmp_path.iterdir()) == folders[-1:]
    assert len(folders) == 3 and len(reports) == 2 and not list(tmp_path.iterdir())
    fails_until = 10
    folders.clear()
    with pytest.raises(JobError, match="Ray did not start on this machine: The current node timed out during startup"):
        ray_session(choice, reports.append).__enter__()
    assert len(folders) == 3


def test_an_alarm_that_is_set_while_ray_starts_is_taken_back() -> None:
    before = signal.setitimer(signal.ITIMER_REAL, 0)  # of pytest-timeout
    try:
        with _kept_signals():
            signal.setitimer(signal.ITIMER_REAL, 60)
            wait_for(lambda: signal.getitimer(signal.ITIMER_REAL)[0] == 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_an_alarm_of_somebody_else_is_kept() -> None:
    before = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with _kept_signals():
            time.sleep(2 * ALARM_POLL_S)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


AT_ONCE = """
import os
import signal
from moray.batch.runtime.ray_choice import choose_ray
from moray.batch.runtime.ray_session import ray_session

for at_once in (True, False):
    with ray_session(choose_ray(), print, ends_at_once=lambda: at_once):
        from ray._private import worker
        raylet = worker._global_node.all_processes["raylet"][0].process
    print(raylet.poll(), os.listdir(os.environ["RAY_TMPDIR"]))
"""


@pytest.mark.slow
def test_who_wants_no_orderly_end_waits_for_no_process() -> None:
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", AT_ONCE], env=bare | {"RAY_TMPDIR": folder},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "-9 []\n0 []\n"), done.stderr


def caused(cause: Exception) -> Exception:
    error = ConnectionError("Failed to connect to Ray cluster at head:6379")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ConnectionError("Failed to connect to Ray cluster at head:6379\nadvice"),
            "the Ray cluster at head:6379 could not be joined: Failed to connect to Ray cluster at head:6379",
        ),
        (
            caused(RuntimeError("Version mismatch: 2.9 and 2.60\nadvice")),
            "the Ray cluster at head:6379 could not be joined: Version mismatch: 2.9 and 2.60",
        ),
        (
            caused(RuntimeError("No node info found matching attributes: ''")),
            "the Ray cluster at head:6379 could not be joined: this machine is no node of it; run moray on one, or "
            "moray submit SPEC --address http://HEAD:8265",
        ),
        (RuntimeError(""), "the Ray cluster at head:6379 could not be joined: RuntimeError"),
    ],
)
def test_a_failed_start_is_explained_by_its_first_line(error: Exception, expected: str) -> None:
    assert _explain_connection_error(error, "head:6379", None) == expected
    here = _explain_connection_error(OSError("No space left\n 2. Set RAY_ADDRESS"), None, Path("/tmp/moray-x"))
    assert here == "Ray did not start on this machine: No space left (its logs: /tmp/moray-x)"
