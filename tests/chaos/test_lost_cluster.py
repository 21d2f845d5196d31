"""Jobs on a cluster that moray did not start: its GCS dies and nothing comes in its place, or their monitor dies."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hold import Hold
from made_jobs import make_spec, write_input
from moray_run import MorayRun, command_name
from ray_cluster import RayNodes

from moray.batch.output.verify import verify
from moray.batch.processes.descendants import find_descendants

# Ray ends a driver without a word when it has missed the GCS for a minute, unless a call of the driver's fails before.
REASON = (
    r"the Ray cluster at \S+:\d+ does not answer any more: |"
    r"the driver exited with code 1; it could not be started again: no Ray cluster answers at --address \S+:\d+ "
)

pytestmark = [pytest.mark.chaos, pytest.mark.alone, pytest.mark.slow]


def test_a_cluster_that_is_lost(tmp_path: Path, hold: Hold, nodes: RayNodes, start: Callable[..., MorayRun]) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} sheep" for i in range(640)]})
    sampling = {"max_tokens": 200, "ignore_eos": True}
    hold.at(1, "commit")
    run = start(tmp_path, make_spec(tmp_path, sampling=sampling, engine={"max_num_seqs": 8}), nodes)
    run.wait_for(lambda: len(run.parts()) >= 1)
    (gcs,) = [pid for pid in find_descendants(os.getpid()) if command_name(pid) == "gcs_server"]
    os.kill(gcs, signal.SIGKILL)
    code, output = run.end()
    status = run.status()
    assert (code, status["state"]) == (1, "FAILED"), output
    assert re.match(REASON, status["reason"]), output
    assert status["reason"] in output and "Traceback" not in output
    assert status["ok_rows"] >= 16 and run.left(logs=True) == []


def test_a_monitor_that_is_lost(tmp_path: Path, hold: Hold, nodes: RayNodes, start: Callable[..., MorayRun]) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": [f"{i} sheep" for i in range(320)]})
    sampling = {"max_tokens": 50, "ignore_eos": True}
    hold.at(2, "commit")
    run = start(tmp_path, make_spec(tmp_path, sampling=sampling, engine={"max_num_seqs": 8}), nodes)
    run.wait_for(lambda: len(run.parts()) >= 1)
    first = run.driver
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in find_descendants(os.getpid())}
    (monitor,) = [pid for pid, title in titles.items() if title.startswith(b"ray::MonitorActor")]
    os.kill(monitor, signal.SIGKILL)
    run.wait_for(lambda: run.driver != first)
    hold.release()
    code, output = run.end()
    status = run.status()
    assert (code, status["state"], status["restarts"]) == (0, "SUCCEEDED", 1), output
    assert status["restart_reason"] == "the monitor actor of the job died"
    assert "Traceback" not in output and verify(str(tmp_path / "out")).closes
    assert run.left() == []
