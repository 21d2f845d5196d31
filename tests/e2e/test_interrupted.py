"""Jobs that are killed, stopped and continued, as processes of their own: every row once, and the answers those of a
job that nobody disturbed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import left_behind
import pytest
from hold import Hold
from made_jobs import TINY, make_spec, read_output, write_input
from moray_run import MORAY, MorayRun
from stages_alone import run_alone

from moray.batch.output.verify import verify
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

ROWS = 160
SHARDS = 10
Start = Callable[[JobSpec], MorayRun]


def make_job(folder: Path, **sections: Any) -> JobSpec:
    """Sampled answers of 16 rows a shard, two shards in the engine at once; some seconds of work."""
    prompts = [f"{i} sheep, {i % 7} lions:" for i in range(ROWS)]
    write_input(folder / "in/a.parquet", {"prompt": prompts}, row_group_size=50)
    sampling = {"max_tokens": 100, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    return make_spec(folder, sampling=sampling | sections.get("sampling", {}), engine={"max_num_seqs": 16})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a job whose stages ran to their end one after the other, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_alone(make_job(folder), Engine(str(TINY), EngineConfig(max_num_seqs=16)))
    rows = read_output(folder)
    assert len({row["generated_text"] for row in rows}) > ROWS * 0.9  # sampled, not all alike
    return rows


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_machine_that_is_lost_leaves_nothing_but_parts_and_the_next_run_goes_on(
    tmp_path: Path, hold: Hold, start: Start, undisturbed: list[dict[str, Any]]
) -> None:
    spec = make_job(tmp_path)
    hold.at(0, "commit")
    first = start(spec)
    first.wait_for((tmp_path / "out/_job/lease.json").exists)
    code, output = start(spec).end()
    assert code == 2 and f"is being written by run {first.status()['run']} (process {first.driver}" in output
    hold.at_parts(first, 3)
    pids = [event["pid"] for event in first.events() if event["event"] == "actor_ready"]
    driver = first.driver
    first.process.send_signal(signal.SIGSTOP)  # so that nobody is there to say what happened
    os.kill(driver, signal.SIGKILL)
    first.kill()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert 0 < len(there) < SHARDS
    assert first.status()["state"] == "RUNNING"  # nobody could write another
    told = subprocess.run([MORAY, "status", tmp_path / "out"], capture_output=True, text=True, check=True).stdout
    assert f"The driver (process {driver} on this machine) is gone; last update " in told
    end_s = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < end_s, "actors outlive their driver"
        time.sleep(0.1)

    hold.release()
    second = start(spec)
    code, output = second.end()
    assert (code, second.status()["state"]) == (0, "SUCCEEDED"), output
    assert {path: path.stat().st_mtime_ns for path in there} == there  # what was done was not done again
    assert sum(event["event"] == "committed" for event in second.events()) == SHARDS - len(there)
    assert read_output(tmp_path) == undisturbed and verify(str(tmp_path / "out")).closes
    left_behind.wait_until_gone(first.tag)
    assert second.left() == []


@pytest.mark.slow
def test_killed_actors_are_replaced_and_their_rows_run_again(
    tmp_path: Path, hold: Hold, start: Start, undisturbed: list[dict[str, Any]]
) -> None:
    run = start(make_job(tmp_path))
    hold.at_parts(run, 3)
    pids = {event["stage"]: event["pid"] for event in run.events() if event["event"] == "actor_ready"}
    for stage in ("worker", "commit"):
        os.kill(pids[stage], signal.SIGKILL)
    hold.release()
    code, output = run.end()
    assert (code, run.status()["state"]) == (0, "SUCCEEDED"), output
    told = run.events()
    lost = {event["stage"]: event["pid"] for event in told if event["event"] == "actor_lost"}
    assert lost == {stage: pids[stage] for stage in ("worker", "commit")}
    assert len([event for event in told if event.get("stage") == "worker" and event["event"] == "actor_ready"]) == 2
    assert read_output(tmp_path) == undisturbed and verify(str(tmp_path / "out")).closes
    assert "raylet" not in output and "Traceback" not in output
    assert run.left() == []


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        pytest.param(signal.SIGINT, True, id="ctrl-c"),  # as a terminal does: to the driver and all of Ray
        pytest.param(signal.SIGTERM, False, id="sigterm", marks=pytest.mark.slow),
    ],
)
def test_a_signal_keeps_what_is_in_flight(
    tmp_path: Path,
    hold: Hold,
    start: Start,
    undisturbed: list[dict[str, Any]],
    number: signal.Signals,
    whole_group: bool,
) -> None:
    hold.at(1, "worker")  # or it would take on all shards while the second one waits
    run = start(make_job(tmp_path))
    hold.at_parts(run)
    before = run.parts()
    if whole_group:
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    run.wait_for(lambda: any(event["event"] == "draining" for event in run.events()))
    hold.release()
    code, output = run.end()
    assert code == 128 + number, output
    assert "Run the same command again to continue." in output
    (draining,) = [event for event in run.events() if event["event"] == "draining"]
    after = {int(name[-14:-8]) for name in run.parts()}
    assert after >= {int(name[-14:-8]) for name in before} | set(draining["shards"])
    assert after == {event["shard"] for event in run.events() if event["event"] == "committed"}
    assert draining["shards"] and len(after) < SHARDS
    status = run.status()
    assert (status["state"], status["reason"]) == ("CANCELLED", number.name)
    assert status["ok_rows"] == 16 * len(after)
    rows = read_output(tmp_path)
    assert len(rows) == 16 * len(after) and all(row in undisturbed for row in rows)
    assert run.left() == []


@pytest.mark.slow
def test_a_job_that_was_stopped_goes_on(
    tmp_path: Path, hold: Hold, start: Start, undisturbed: list[dict[str, Any]]
) -> None:
    spec = make_job(tmp_path)
    run = start(spec)
    hold.at_parts(run)
    run.process.send_signal(signal.SIGINT)
    run.wait_for(lambda: any(event["event"] == "draining" for event in run.events()))
    hold.release()
    code, output = run.end()
    assert code == 130, output
    code, output = start(spec).end()
    assert code == 0, output
    assert read_output(tmp_path) == undisturbed and verify(str(tmp_path / "out")).closes


@pytest.mark.slow
def test_sigterm_leaves_rows_in_flight_all_the_time_they_need(tmp_path: Path, start: Start) -> None:
    """Ray's C++ side had the process aborted three seconds later."""
    run = start(make_job(tmp_path, sampling={"max_tokens": 1900}))
    run.wait_for(lambda: (tmp_path / "out/_job/status.json").exists() and run.status()["generated_tokens"] > 0)
    run.process.send_signal(signal.SIGTERM)
    code, output = run.end()
    assert code in (0, 143), output  # 0: all shards were in flight
    (draining,) = [event for event in run.events() if event["event"] == "draining"]
    assert {int(name[-14:-8]) for name in run.parts()} >= set(draining["shards"])
    assert run.left() == []


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, start: Start) -> None:
    run = start(make_job(tmp_path, sampling={"max_tokens": 1900}))
    run.wait_for(lambda: (tmp_path / "out/_job/status.json").exists() and run.status()["generated_tokens"] > 0)
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_for(lambda: any(event["event"] == "draining" for event in run.events()))
    os.killpg(run.process.pid, signal.SIGINT)
    started_s = time.monotonic()
    code, output = run.end()
    assert code == 130 and time.monotonic() - started_s < 30, output
    status = run.status()
    assert (status["state"], status["pending_rows"]) == ("CANCELLED", ROWS)
    assert "stopping at once" in output and "Traceback" not in output
    assert run.left() == []


@pytest.mark.slow
def test_sigterm_while_ray_starts_ends_the_job_in_good_order(tmp_path: Path, start: Start) -> None:
    run = start(make_job(tmp_path))
    run.wait_for(lambda: run.ray_is_starting())  # by then ray.init is at work
    run.process.send_signal(signal.SIGTERM)
    code, output = run.end()
    assert (code, run.status()["state"], run.status()["reason"]) == (143, "CANCELLED", "SIGTERM"), output
    events = run.events()
    assert [event["event"] for event in events if event["event"] in ("drain", "actor_started", "ended")] == [
        "drain",
        "ended",
    ], "no model is loaded for it"
    assert "Traceback" not in output and (tmp_path / "out/_job/report.html").exists()
    assert run.left() == []


@pytest.mark.slow
def test_a_second_signal_while_ray_starts_ends_it_at_once(tmp_path: Path, start: Start) -> None:
    run = start(make_job(tmp_path))
    run.wait_for(lambda: run.ray_is_starting())
    run.process.send_signal(signal.SIGTERM)
    run.wait_for(lambda: any(event["event"] == "drain" for event in run.events()))
    run.process.send_signal(signal.SIGINT)
    code, output = run.end()
    assert (code, run.status()["state"]) == (143, "CANCELLED"), output
    assert "stopping at once" in output and "Traceback" not in output
    assert run.left(logs=True) == []
