"""The driver, the raylet and the GCS of a local Ray die in the middle of a job, or whoever watches them does."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import left_behind
import pytest
from hold import Hold
from made_jobs import make_spec, write_input
from moray_run import MORAY, MorayRun
from patience import PATIENCE_S

from moray.batch.output.verify import verify
from moray.batch.processes.descendants import MARK, find_descendants
from moray.batch.processes.exit_reason import OomKills, describe_exit
from moray.batch.runtime.ray_watch import NEEDED
from moray.batch.spec import JobSpec

pytestmark = pytest.mark.alone

ROWS, SHARDS = 320, 20
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
KILLED = describe_exit(signal.SIGKILL, OomKills().recent)  # in the words for this machine
Start = Callable[..., MorayRun]


def make_job(folder: Path, **sections: Any) -> JobSpec:
    """16 rows a shard, some seconds of work."""
    prompts = [f"{i} sheep, {i % 7} lions:" for i in range(ROWS)]
    write_input(folder / "in/a.parquet", {"prompt": prompts})
    sampling = {"max_tokens": 100, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    return make_spec(folder, **{"sampling": sampling, "engine": {"max_num_seqs": 16}} | sections)


def check_succeeded(run: MorayRun, hold: Hold, folder: Path, *lost: str) -> None:
    """Let it end; it ended well, and says what happened to its drivers."""
    hold.release()
    code, output = run.end()
    assert (code, run.status()["state"]) == (0, "SUCCEEDED"), output
    events = run.all_events()
    assert [event["reason"] for event in events if event["event"] == "driver_lost"] == list(lost), output
    status = run.status()
    assert (status["restarts"], status["restart_reason"]) == (len(lost), lost[-1])
    for reason in lost:
        assert f"{reason[0].upper()}{reason[1:]}. The driver is started again and continues the job" in output
    assert "Traceback" not in output, output
    found = verify(str(folder / "out"))
    assert found.closes and found.failed == 0, found.problems
    assert len(run.told_commits()) >= SHARDS - len(lost), "at most the last commit before a death was not told"
    assert run.left() == []


def find_unmarked(run: MorayRun) -> list[int]:
    """Processes below the driver that the command would not end: without the token that names their Ray's folder."""
    (folder,) = run.ray_folder.glob("moray-*")
    mark = f"{MARK}={folder.name.removeprefix('moray-')}".encode()
    found = []
    for pid in find_descendants(run.driver):
        with suppress(OSError):
            if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def plasma_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*plasma*")}


@pytest.mark.slow
def test_a_job_outlives_its_raylet(tmp_path: Path, hold: Hold, start: Start) -> None:
    before = plasma_files()
    run = start(make_job(tmp_path))
    hold.at_parts(run)
    assert len(find_descendants(run.driver)) > 5
    run.wait_for(lambda: not find_unmarked(run))  # one that was just forked gets it with its program
    os.kill(run.ray_process("raylet"), signal.SIGKILL)
    check_succeeded(run, hold, tmp_path, f"the raylet of the local Ray {KILLED}")
    assert plasma_files() <= before


@pytest.mark.slow
def test_a_job_outlives_its_monitor(tmp_path: Path, hold: Hold, start: Start) -> None:
    """Ray never starts the monitor again, and nobody else knows what it knew."""
    run = start(make_job(tmp_path))
    hold.at_parts(run)
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in find_descendants(run.driver)}
    (monitor,) = [pid for pid, title in titles.items() if title.startswith(b"ray::MonitorActor")]
    os.kill(monitor, signal.SIGKILL)
    check_succeeded(run, hold, tmp_path, "the monitor actor of the local Ray died")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_job_outlives_a_ray_that_dies_while_it_starts(name: str, tmp_path: Path, hold: Hold, start: Start) -> None:
    hold.at(0, "raylet")
    run = start(make_job(tmp_path))
    run.wait_for(lambda: hold.waiting("raylet"))
    if name == "raylet":  # it cannot get any further without its GCS
        os.kill(run.ray_process("gcs_server"), signal.SIGSTOP)
        hold.release("raylet")
        run.wait_for(lambda: run.ray_processes("raylet"))
    os.kill(run.ray_process(name), signal.SIGKILL)
    check_succeeded(run, hold, tmp_path, f"the {NEEDED[name]} of the local Ray {KILLED} while that started")


@pytest.mark.slow
def test_a_job_outlives_all_that_it_can_lose(tmp_path: Path, hold: Hold, start: Start) -> None:
    """More deaths than limits.restarts allows in a row: each time something was committed in between."""
    run = start(make_job(tmp_path, limits={"restarts": 1}))
    lost = []
    for name, number in (
        ("gcs_server", signal.SIGKILL),
        ("driver", signal.SIGKILL),
        ("raylet", signal.SIGSEGV),
        ("driver", signal.SIGABRT),
    ):
        hold.at_parts(run, 2)
        driver = run.driver
        os.kill(driver if name == "driver" else run.ray_process(name), number)
        run.wait_for(lambda gone=driver: run.driver != gone)
        subject = "the driver" if name == "driver" else f"the {NEEDED[name]} of the local Ray"
        lost.append(f"{subject} {describe_exit(number, OomKills().recent)}")
    check_succeeded(run, hold, tmp_path, *lost)


@pytest.mark.slow
def test_a_driver_that_dies_at_each_start_ends_the_job(tmp_path: Path, hold: Hold, start: Start) -> None:
    hold.at(0, "raylet")
    run = start(make_job(tmp_path, limits={"restarts": 1}))
    first = run.driver
    run.wait_for(lambda: is_told(run))
    os.kill(first, signal.SIGKILL)
    run.wait_for(lambda: run.driver != first and is_told(run))
    os.kill(run.driver, signal.SIGKILL)
    code, output = run.end()
    reason = f"the driver {KILLED}; restarted 1 time with no part committed in between (limits.restarts is 1)"
    assert code == 1 and f"test FAILED: {reason}" in output and "Traceback" not in output, output
    status = run.status()
    assert (status["state"], status["reason"], status["restarts"]) == ("FAILED", reason, 1)
    assert status["pending_rows"] == ROWS
    assert reason in (tmp_path / "out/_job/report.html").read_text()
    assert [event["event"] for event in run.events()][-2:] == ["driver_lost", "ended"]
    assert len(left_behind.sessions(run.ray_folder)) <= 1, "the logs of the last one"
    assert run.left(logs=True) == []


def is_told(run: MorayRun) -> bool:
    """Return whether status.json is of the run that holds the lease."""
    lease, path = run.lease(), run.folder / "out/_job/status.json"
    return lease is not None and path.exists() and run.status()["run"] == lease["run"]


@pytest.mark.slow
def test_without_restarts_the_first_death_ends_the_job(tmp_path: Path, hold: Hold, start: Start) -> None:
    run = start(make_job(tmp_path, limits={"restarts": 0}))
    hold.at_parts(run)
    os.kill(run.ray_process("raylet"), signal.SIGKILL)
    code, output = run.end()
    reason = f"the raylet of the local Ray {KILLED}; limits.restarts is 0"
    status = run.status()
    assert (code, status["state"], status["reason"]) == (1, "FAILED", reason), output
    assert status["ok_rows"] == 16 * len(run.parts())
    assert "Run the same command again to continue." in output
    assert run.left(logs=True) == []


@pytest.mark.slow  # test_a_driver_ends_with_its_parent is the fast one, without a Ray
def test_a_command_that_is_killed_takes_its_driver_along(tmp_path: Path, hold: Hold, start: Start) -> None:
    run = start(make_job(tmp_path))
    hold.at_parts(run)
    run.kill()
    assert run.left() == []
    status = run.status()
    assert (status["state"], status["reason"]) == ("CANCELLED", "SIGKILL")


@pytest.mark.slow
def test_a_terminal_that_is_closed(tmp_path: Path, hold: Hold, start: Start) -> None:
    run = start(make_job(tmp_path))
    hold.at_parts(run)
    os.killpg(run.process.pid, signal.SIGHUP)  # to the command, the driver and all of Ray
    run.wait_for(lambda: any(event["event"] == "draining" for event in run.events()))
    hold.release()
    code, output = run.end()
    status = run.status()
    assert (code, status["state"], status["reason"]) == (129, "CANCELLED", "SIGHUP"), output
    (draining,) = [event for event in run.events() if event["event"] == "draining"]
    assert draining["shards"] and status["ok_rows"] == 16 * len(run.parts()) > 0
    assert run.left() == []


@pytest.mark.slow
def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """`| head` ends after the first line; the job goes on, also where it is to ignore SIGHUP, as nohup has it."""
    (tmp_path / "job.yaml").write_text(make_job(tmp_path).to_yaml())
    command = f"trap '' HUP; {MORAY} run {tmp_path}/job.yaml 2>{tmp_path}/errors | head -n 1"
    with subprocess.Popen(["bash", "-c", command], start_new_session=True) as shell:
        end_s = time.monotonic() + PATIENCE_S
        while not any((tmp_path / "out").glob("part-*")):
            assert shell.poll() is None and time.monotonic() < end_s
            time.sleep(0.05)
        os.killpg(shell.pid, signal.SIGHUP)
        shell.wait(PATIENCE_S)
    errors = (tmp_path / "errors").read_text()
    assert not re.search("Traceback|BrokenPipe|Exception", errors), errors
    assert verify(str(tmp_path / "out")).closes


@pytest.mark.slow
def test_a_terminal_stays_one_over_a_restart(tmp_path: Path, hold: Hold, start: Start) -> None:
    """The bar is drawn by both drivers; a death in between does not leave the cursor hidden."""
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    seen = ""

    def read_until(is_so: Callable[[], Any]) -> None:
        nonlocal seen
        end_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end_s, seen[-2000:]
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")

    hold.at(0, "prepare")
    run = start(make_job(tmp_path), terminal=theirs)
    os.close(theirs)
    read_until(lambda: is_told(run) and "starting Ray" in seen)
    os.kill(run.driver, signal.SIGKILL)
    read_until(lambda: "continues the job (restart 1)." in seen)
    assert seen.rindex(SHOW_CURSOR) > seen.rindex(HIDE_CURSOR)
    seen = ""
    read_until(lambda: HIDE_CURSOR in seen and "starting Ray" in seen and is_told(run))
    run.process.send_signal(signal.SIGTERM)
    read_until(lambda: "CANCELLED: SIGTERM" in seen and "to continue." in seen)
    assert run.process.wait(PATIENCE_S) == 143 and seen.rindex(SHOW_CURSOR) > seen.rindex(HIDE_CURSOR)
    os.close(terminal)
