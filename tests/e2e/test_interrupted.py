"""Jobs that are killed, stopped and continued, as processes of their own: every row once, and the answers those of a
job that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec, read_output, write_input

from batch.driver import run_job
from batch.spec import JobSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

MORAY = Path(sys.executable).with_name("moray")
ROWS = 160
SHARDS = 10
PATIENCE_S = 240.0


def make_job(folder: Path, **sections: Any) -> JobSpec:
    """Sampled answers of 16 rows a shard, two shards in the engine at once; some seconds of work."""
    prompts = [f"{i} sheep, {i % 7} lions:" for i in range(ROWS)]
    write_input(folder / "in/a.parquet", {"prompt": prompts}, row_group_size=50)
    sampling = {"max_tokens": 100, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    return make_spec(folder, sampling=sampling | sections.get("sampling", {}), engine={"max_num_seqs": 16})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> list[dict[str, Any]]:
    """The rows of a job that ran to its end at once, on one CPU."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_job(make_job(folder)).exit_code == 0
    rows = read_output(folder)
    assert len({row["generated_text"] for row in rows}) > ROWS * 0.9  # sampled, not all alike
    return rows


class Run:
    """`moray run` in a process group of its own, as a shell would start it."""

    def __init__(self, folder: Path, spec: JobSpec) -> None:
        self.folder = folder
        path = folder / "job.yaml"
        path.write_text(spec.to_yaml())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [MORAY, "run", path],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def parts(self) -> set[str]:
        return {path.name for path in (self.folder / "out").glob("part-*.parquet")}

    def events(self) -> list[dict[str, Any]]:
        """Of the latest run."""
        files = sorted((self.folder / "out/_job/events").glob("*.jsonl"))
        return [json.loads(line) for line in files[-1].read_text().splitlines()]

    def wait_for(self, what: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert self.process.poll() is None, f"the job ended early:\n{self.output()}"
            assert time.monotonic() < end_s, "the job hangs"
            time.sleep(0.02)
        return found

    def wait_until_half_done(self) -> set[str]:
        """The parts that are there, some but by far not all."""
        self.wait_for(lambda: len(self.parts()) >= 3)
        there = self.parts()
        assert 3 <= len(there) < SHARDS - 2, "too fast to be caught in the middle"
        return there

    def output(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / "out/_job/status.json").read_text())
        assert status["input_rows"] == status["ok_rows"] + status["failed_rows"] + status["pending_rows"] == ROWS
        return status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[JobSpec], Run]]:
    runs: list[Run] = []

    def begin(spec: JobSpec) -> Run:
        runs.append(Run(tmp_path, spec))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        assert run.process.stdout is not None
        run.process.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_driver_leaves_nothing_but_parts_and_its_next_run_goes_on(
    tmp_path: Path, start: Callable[[JobSpec], Run], undisturbed: list[dict[str, Any]]
) -> None:
    spec = make_job(tmp_path)
    first = start(spec)
    first.wait_until_half_done()
    pids = [event["pid"] for event in first.events() if event["event"] == "actor_ready"]
    first.process.kill()
    first.process.wait()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert 0 < len(there) < SHARDS
    assert first.status()["state"] == "RUNNING"  # nobody could write another
    end_s = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < end_s, "actors outlive their driver"
        time.sleep(0.1)

    second = start(spec)
    code, output = second.end()
    assert (code, second.status()["state"]) == (0, "SUCCEEDED"), output
    assert {path: path.stat().st_mtime_ns for path in there} == there  # what was done was not done again
    assert sum(event["event"] == "committed" for event in second.events()) == SHARDS - len(there)
    assert read_output(tmp_path) == undisturbed


def test_a_killed_worker_is_replaced_and_its_rows_run_again(
    tmp_path: Path, start: Callable[[JobSpec], Run], undisturbed: list[dict[str, Any]]
) -> None:
    run = start(make_job(tmp_path))
    run.wait_until_half_done()
    (pid,) = [event["pid"] for event in run.events() if event.get("stage") == "worker"]
    os.kill(pid, signal.SIGKILL)
    there = len(run.parts())
    assert 0 < there < SHARDS
    code, output = run.end()
    assert (code, run.status()["state"]) == (0, "SUCCEEDED"), output
    told = run.events()
    (lost,) = [event for event in told if event["event"] == "actor_lost"]
    assert lost["pid"] == pid
    assert len([event for event in told if event.get("stage") == "worker" and event["event"] == "actor_ready"]) == 2
    assert read_output(tmp_path) == undisturbed
    assert "raylet" not in output and "Traceback" not in output


def test_ctrl_c_keeps_what_is_in_flight_and_so_does_sigterm(
    tmp_path: Path, start: Callable[[JobSpec], Run], undisturbed: list[dict[str, Any]]
) -> None:
    spec = make_job(tmp_path)
    for number, group in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        run = start(spec)
        begun = run.parts()
        run.wait_for(lambda run=run, begun=begun: len(run.parts()) > len(begun))
        before = run.parts()
        assert 0 < len(before) < SHARDS - 1
        if group:
            os.killpg(run.process.pid, number)  # as a terminal does: to the driver and all of Ray
        else:
            run.process.send_signal(number)
        code, output = run.end()
        assert code == 128 + number, output
        assert "Run the same command again to continue." in output
        (draining,) = [event for event in run.events() if event["event"] == "draining"]
        after = {int(name[-14:-8]) for name in run.parts()}
        assert after >= {int(name[-14:-8]) for name in before} | set(draining["shards"])
        committed = [event["shard"] for event in run.events() if event["event"] == "committed"]
        assert after == set(committed) | {int(name[-14:-8]) for name in begun}
        assert draining["shards"] and len(after) < SHARDS
        status = run.status()
        assert (status["state"], status["reason"]) == ("CANCELLED", number.name)
        assert status["ok_rows"] == 16 * len(after)
    code, output = start(spec).end()
    assert code == 0, output
    assert read_output(tmp_path) == undisturbed


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, start: Callable[[JobSpec], Run]) -> None:
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
