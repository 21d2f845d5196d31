"""Each process without which a job on one machine does not go on is killed in the middle of it, one after another."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import left_behind
import pytest
from hold import Hold
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from undisturbed import answers

from moray.batch.output.verify import verify
from moray.batch.processes.exit_reason import OomKills, describe_exit
from moray.batch.processes.process import start_time
from moray.batch.runtime.ray_watch import NEEDED
from moray.batch.spec import JobSpec
from moray.engine.params import SamplingParams

pytestmark = [pytest.mark.chaos, pytest.mark.alone, pytest.mark.slow]

ROWS = 256
SAMPLING = {"max_tokens": 60, "temperature": 1.0, "seed": 13, "ignore_eos": True}
SAMPLED = range(0, ROWS, 8)  # rows that are compared
KILLED = describe_exit(signal.SIGKILL, OomKills().recent)  # in the words for this machine


def kill_actor(run: MorayRun, hold: Hold, stage: str) -> int:
    """Kill an actor of the stage that has a shard in hand, which waits for it. Returns its process id."""
    run.wait_for(lambda: hold.waiting(stage))
    pid = hold.waiting(stage)[0]
    os.kill(pid, signal.SIGKILL)
    run.wait_for(lambda: not start_time(pid))
    hold.release(stage)
    return pid


def kill_head(run: MorayRun, hold: Hold, name: str) -> None:
    """Kill the driver, or a part of its Ray, when two more parts are there, and wait for the next driver."""
    hold.at_parts(run, 2)
    driver = run.driver
    os.kill(driver if name == "driver" else run.ray_process(name), signal.SIGKILL)
    run.wait_for(lambda: run.driver != driver)


def test_every_process_of_a_job(tmp_path: Path, hold: Hold, start: Callable[[Path, JobSpec], MorayRun]) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} sheep, {i % 7} lions" for i in range(ROWS)]})
    hold.at(0, "prepare")
    hold.at(1, "worker")
    hold.at(2, "commit")
    run = start(tmp_path, make_spec(tmp_path, sampling=SAMPLING, engine={"max_num_seqs": 8}))
    killed = {kill_actor(run, hold, stage) for stage in ("prepare", "worker")}
    for name in ("raylet", "gcs_server", "driver"):
        kill_head(run, hold, name)
    hold.at(len(run.parts()) + 2, "commit")
    killed.add(kill_actor(run, hold, "commit"))  # the last one: no later driver clears up what it was writing
    assert any("/tmp/part-" in path for path in left_behind.temporaries(tmp_path / "out"))
    code, output = run.end()
    assert code == 0 and "Traceback" not in output, output
    status, events = run.status(), run.all_events()
    assert (status["state"], status["restarts"]) == ("SUCCEEDED", 3)
    lost = [f"the {NEEDED[name]} of the local Ray {KILLED}" for name in ("raylet", "gcs_server")]
    lost.append(f"the driver {KILLED}")
    assert [event["reason"] for event in events if event["event"] == "driver_lost"] == lost
    assert {event["pid"] for event in events if event["event"] == "actor_lost"} >= killed
    found = verify(str(tmp_path / "out"))
    assert found.closes and found.failed == 0, (found.errors, found.problems)
    texts = {("a.parquet", row["source_row"]): row["generated_text"] for row in read_output(tmp_path)}
    sampled = [("a.parquet", row) for row in SAMPLED]
    assert {row: texts[row] for row in sampled} == answers(tmp_path, sampled, SamplingParams(**SAMPLING))
    assert run.left() == []
