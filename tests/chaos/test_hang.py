"""A worker that hangs, stopped by the kernel: no thread of it goes on, it says nothing and hears nothing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hold import Hold
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from undisturbed import answers

from moray.batch.output.verify import verify
from moray.batch.spec import JobSpec
from moray.engine.params import SamplingParams

pytestmark = pytest.mark.slow

ROWS = 512  # 32 shards
SAMPLING: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 7, "ignore_eos": True}
Start = Callable[[Path, JobSpec], MorayRun]


def stop_worker(folder: Path, hold: Hold, start: Start, **limits: float) -> tuple[MorayRun, int]:
    """A job whose worker is stopped when two parts are there and it has more to do."""
    hold.at(2, "worker")
    write_input(folder / "in/a.parquet", {"prompt": [f"{i} sheep, {i % 7} lions" for i in range(ROWS)]})
    run = start(folder, make_spec(folder, sampling=SAMPLING, engine={"max_num_seqs": 8}, limits=limits))
    run.wait_for(lambda: len(run.parts()) >= 2 and hold.waiting("worker"))
    (pid,) = hold.waiting("worker")
    os.kill(pid, signal.SIGSTOP)
    hold.release()
    return run, pid


def test_a_worker_that_hangs_is_killed_and_its_rows_run_again(tmp_path: Path, hold: Hold, start: Start) -> None:
    run, pid = stop_worker(tmp_path, hold, start, row_timeout_s=10)
    code, output = run.end()
    assert code == 0, output
    assert f"Worker {pid} on node " in output and " hangs: no step came back in 1" in output
    (lost,) = [event for event in run.events() if event["event"] == "actor_lost"]
    assert lost["pid"] == pid and lost["reason"].endswith(" s; limits.row_timeout_s is 10")
    assert verify(str(tmp_path / "out")).closes
    found = {("a.parquet", row["source_row"]): row["generated_text"] for row in read_output(tmp_path)}
    assert found == answers(tmp_path, found, SamplingParams(**SAMPLING))
    assert run.left() == []


def test_the_jobs_time_ends_it_although_its_worker_hangs(tmp_path: Path, hold: Hold, start: Start) -> None:
    run, _ = stop_worker(tmp_path, hold, start, job_timeout_s=90)
    code, output = run.end()
    assert code == 1 and "FAILED: job_timeout_s (90) is over" in output, output
    assert 0 < run.status()["ok_rows"] < ROWS
    assert run.left(logs=True) == []
    again = start(tmp_path, make_spec(tmp_path, sampling=SAMPLING, engine={"max_num_seqs": 8}))
    code, output = again.end()
    assert code == 0 and verify(str(tmp_path / "out")).closes, output
    found = {("a.parquet", row["source_row"]): row["generated_text"] for row in read_output(tmp_path)}
    assert len(found) == ROWS and found == answers(tmp_path, found, SamplingParams(**SAMPLING))
    assert again.left() == []


def test_without_a_limit_it_is_said_and_nothing_is_killed(tmp_path: Path, hold: Hold, start: Start) -> None:
    """After three minutes. The worker goes on where it was, once it can."""
    run, pid = stop_worker(tmp_path, hold, start)
    run.wait_for(lambda: any(event["event"] == "worker_hangs" for event in run.events()))
    os.kill(pid, signal.SIGCONT)
    code, output = run.end()
    assert code == 0 and "With limits.row_timeout_s it would be killed and the row found." in output, output
    assert not any(event["event"] == "actor_lost" for event in run.events())
    assert verify(str(tmp_path / "out")).closes and run.left() == []
