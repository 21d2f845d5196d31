"""`moray status --watch` on a folder that another process writes: on a terminal, in a log, and when nobody writes."""

import io
import json
import os
import pty
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from patience import PATIENCE_S
from ray.job_submission import JobStatus
from rich.console import Console
from test_status_text import CANCELLED, DONE, RUNNING

from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.output.job_folder import PLAN
from moray.batch.output.lease import LEASE, Holder
from moray.batch.processes.process import start_time
from moray.batch.status.status import Status
from moray.engine.errors import UserError
from moray.jobs.clusters.submission import Submission
from moray.jobs.commands import cluster as cluster_cli
from moray.jobs.views import status as status_view
from moray.jobs.views import watch as watching
from moray.jobs.views.progress_bar import ProgressDisplay

SUBMISSION = Submission("demo-1", "demo", "out", JobStatus.RUNNING, 0.0, "", None)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(status: Status, updated: datetime | None = None) -> None:
    values = json.loads(status.to_json())
    if updated is not None:
        values["updated_at"] = updated.isoformat()
    OutputFolder("out").write(f"{JOB}/status.json", json.dumps(values).encode(), durable=False)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "moray.jobs.cli", "status", "out", *options]


def test_in_a_log_there_are_lines_until_the_end() -> None:
    write(RUNNING)
    with subprocess.Popen(command("--watch", "--price", "2.5"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("demo: 1,010/1,200 rows, 2 failed (too_long 2), 2,340 tokens/s in")
        write(replace(RUNNING, rows_done=1100))  # within ten seconds: no line
        write(CANCELLED)
        rest, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert rest.splitlines()[0] == "demo CANCELLED: SIGINT" and "  2 worker-hours, $5.00" in rest


def test_on_a_terminal_it_is_drawn_anew() -> None:
    write(RUNNING)
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    with subprocess.Popen(command("--watch"), stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = ""
        for rows in (1010, 1020):
            write(replace(RUNNING, rows_done=rows))
            while f"{rows:,}/1,200" not in seen:
                seen += os.read(terminal, 4096).decode()
        write(DONE)
        while "output: out/demo" not in seen:
            seen += os.read(terminal, 4096).decode()
        assert process.wait(PATIENCE_S) == 0
    os.close(terminal)
    assert "2,340 tokens/s in, 1,234 out, 9.4 s left (8.1 s to 12 s)" in seen
    assert "demo SUCCEEDED\r\n" in seen


def test_without_watch_it_is_told_once() -> None:
    write(RUNNING)
    status = subprocess.run(command("--price", "2.5"), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert status.stdout.splitlines() == [
        "demo RUNNING: 1,010/1,200 rows, 2 failed (too_long 2)",
        "  2,340 tokens/s in, 1,234 out, 9.4 s left (8.1 s to 12 s)",
        "  2 workers, 1 starting, 98% busy, KV cache 41%, $5.00 so far",
        "  output: out/demo",
    ]
    both = subprocess.run(command("--json", "--watch"), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert both.returncode == 2 and "Give one of them" in both.stderr


def hold(pid: int, started: str, parent: int = 0) -> None:
    """Write the lease of a process on this machine."""
    holder = Holder("r", socket.gethostname(), pid, started, parent=parent, parent_started=start_time(parent))
    OutputFolder("out").write(LEASE, json.dumps(asdict(holder)).encode())


def test_a_driver_on_this_machine_that_is_dead() -> None:
    write(RUNNING)
    hold(os.getpid(), start_time(os.getpid()))
    alive = subprocess.run(command(), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "gone" not in alive.stdout
    hold(os.getpid(), "1")  # the process id belongs to another process now
    message = f"The driver (process {os.getpid()} on this machine) is gone; last update "
    gone = subprocess.run(command(), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert gone.stdout.splitlines()[-1].startswith(f"  {message}") and "Run the job again to continue." in gone.stdout
    as_json = subprocess.run(command("--json"), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert json.loads(as_json.stdout)["state"] == "RUNNING" and as_json.stderr.startswith(message)
    hold(os.getpid(), "1", parent=os.getpid())
    again = subprocess.run(command(), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert f"The driver has died; process {os.getpid()} starts it again." in again.stdout


class Words:
    """Returns the given states one after the other; None = the cluster does not answer."""

    def __init__(self, *words: Submission | None) -> None:
        self._words: Iterator[Submission | None] = iter(words)

    def __call__(self) -> Submission:
        word = next(self._words)
        if word is None:
            raise UserError("no Ray cluster answers")
        return word


def look(ask: Words | None = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    with ProgressDisplay(console) as display:
        code = watching.watch("out", display, ask)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_a_job_that_fell_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silence is reported once; when the job continues, it is watched to its end."""
    naps = iter([lambda: None, lambda: write(RUNNING), lambda: write(DONE)])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(naps)())
    write(RUNNING, updated=datetime.now(UTC) - timedelta(minutes=5))
    code, text = look()
    assert code == 0
    assert text.count("Last update 5 min 0") == 1 and "the job was killed, or hangs" in text


def test_the_end_of_an_earlier_run_is_no_end_while_the_cluster_runs_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "ASK_EVERY_S", 0.0)
    naps = iter([lambda: write(RUNNING), lambda: write(DONE)])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(naps)())
    write(CANCELLED)
    code, text = look(Words(SUBMISSION, SUBMISSION, replace(SUBMISSION, state=JobStatus.SUCCEEDED)))
    assert code == 0 and "CANCELLED" not in text and "demo SUCCEEDED" in text


def test_a_job_that_died_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    write(RUNNING)
    code, text = look(Words(replace(SUBMISSION, state=JobStatus.FAILED, message="node lost")))
    assert code == 1 and "demo-1 FAILED on the cluster" in text


def test_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "ASK_EVERY_S", 0.0)
    naps = iter([lambda: None, lambda: None])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(naps)())
    write(CANCELLED)
    code, text = look(Words(SUBMISSION, None))
    assert code == 130 and "does not answer any more" in text and "demo CANCELLED" in text


def test_a_status_that_is_gone_or_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    OutputFolder("out").write(PLAN, b"{}")
    for content in (None, b"", b"{"):
        if content is not None:
            OutputFolder("out").write(f"{JOB}/status.json", content)
        with pytest.raises(
            UserError, match=r"^out/_job/status.json is missing or damaged, .* moray verify out. Running"
        ):
            cluster_cli.status("out")
    assert "?" in str(list(status_view.submissions_table([SUBMISSION]).columns[2].cells))
    with pytest.raises(UserError, match=r"^in is no job's output folder; to find a job by its name"):
        cluster_cli.status("in")
    write(DONE)
    cluster_cli.status("out", as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == "SUCCEEDED"


def test_a_status_that_is_damaged_for_a_while_is_watched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    naps = iter([lambda: OutputFolder("out").write(f"{JOB}/status.json", b"{"), lambda: write(DONE)])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(naps)())
    write(RUNNING)
    code, text = look()
    assert code == 0 and "demo SUCCEEDED" in text
