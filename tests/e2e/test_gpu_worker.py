"""A job whose workers ask for GPUs, on a Ray that is told to have two: Ray Data's side of it needs no GPU.

MORAY_DEVICE=cpu has the workers compute on the CPU; without it they say that they see no GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hold import HELD, Hold
from made_jobs import read_output, write_input
from patience import PATIENCE_S

from moray.kernels.cpu.isa import isas

SCRIPT = """
import json
import sys
import ray
from made_jobs import make_spec
from moray.batch.runtime.driver import run_job
from pathlib import Path
ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
spec = make_spec(Path(sys.argv[1]), engine={"max_num_seqs": 4}, workers=json.loads(sys.argv[2]))
result = run_job(spec)
print(f"{result.status.state.name}: {result.status.reason}")
sys.exit(result.exit_code)
"""

# A GPU that is broken shows when CUDA is initialized, or when the first kernel is loaded. The worker on a sound GPU
# loads its model once the driver has recorded that a broken one failed.
SITE = """
import importlib.abc, importlib.util, os, sys, time
from pathlib import Path

class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "moray.engine.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_break(module):
            execute(module)
            load = module.load_model

            def broken(*args, **kwargs):
                if os.environ["CUDA_VISIBLE_DEVICES"] in os.environ["BROKEN_GPUS"].split(","):
                    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
                while not any("start_failed" in path.read_text() for path in events.glob("*.jsonl")):
                    time.sleep(0.1)
                return load(*args, **kwargs)

            events = Path(os.environ["EVENTS"])
            module.Engine.__init__.__kwdefaults__["load"] = broken

        spec.loader.exec_module = execute_and_break
        return spec

sys.meta_path.insert(0, Breaker())
"""


class Job:
    """A job in a process of its own.

    sitecustomize:  the folder of a module that all its processes import first
    workers:        of its spec
    """

    def __init__(
        self, folder: Path, sitecustomize: Path | None, workers: dict[str, int] | None = None, **environment: str
    ) -> None:
        write_input(folder / "in/a.parquet", {"prompt": [f"max({i}, 12) =" for i in range(32)]})
        tests = Path(__file__).parents[1]
        paths = [*([sitecustomize] if sitecustomize else []), tests, tests.parent / "src"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
        self._events = folder / "out/_job/events"
        command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(workers or {"min": 2})]
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def events(self) -> list[dict[str, Any]]:
        """Return what happened so far that concerns no other stage than the workers'."""
        lines = [line for path in self._events.glob("*.jsonl") for line in path.read_text().splitlines()]
        return [event for event in map(json.loads, lines) if event.get("stage", "worker") == "worker"]

    def count(self, name: str) -> int:
        return sum(event["event"] == name for event in self.events())

    def wait(self) -> tuple[int, str]:
        """Return the exit code and what was written, once it is over."""
        output, errors = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, output + errors


@pytest.fixture
def breakable(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    return tmp_path


def run_with_broken_gpus(folder: Path, gpus: str) -> tuple[int, str, list[dict[str, Any]]]:
    variables = {"MORAY_DEVICE": "cpu", "BROKEN_GPUS": gpus, "EVENTS": str(folder / "out/_job/events")}
    job = Job(folder, folder / "site", **variables)
    exit_code, output = job.wait()
    return exit_code, output, job.events()


@pytest.mark.slow
def test_a_job_takes_all_the_gpus_there_are(tmp_path: Path, hold: Hold) -> None:
    hold.at(0, "worker")  # so that the first worker leaves rows to the second one
    job = Job(tmp_path, HELD, MORAY_DEVICE="cpu")
    end_s = time.monotonic() + PATIENCE_S
    while job.count("actor_ready") < 2:
        assert time.monotonic() < end_s, job.events()
        time.sleep(0.1)
    hold.release()
    exit_code, output = job.wait()
    assert exit_code == 0, output
    assert all(row["error"] is None for row in read_output(tmp_path))
    assert job.count("actor_ready") == 2


@pytest.mark.slow
def test_a_worker_that_cannot_start_on_its_gpu_does_not_end_the_job(breakable: Path) -> None:
    exit_code, output, events = run_with_broken_gpus(breakable, "0")
    assert exit_code == 0, output
    assert all(row["error"] is None for row in read_output(breakable))
    failed = [event["reason"] for event in events if event["event"] == "start_failed"]
    assert failed and all("RuntimeError: CUDA error: uncorrectable ECC error" in reason for reason in failed)
    assert len({event["actor"] for event in events if event["event"] == "actor_ready"}) == 1


@pytest.mark.slow
def test_a_job_whose_workers_all_fail_to_start_says_why(breakable: Path) -> None:
    exit_code, output, events = run_with_broken_gpus(breakable, "0,1")
    assert exit_code == 1
    assert "FAILED: worker could not be started 3 times in a row, and none is ready:" in output, output
    assert "RuntimeError: CUDA error: uncorrectable ECC error encountered" in output
    failed = [event for event in events if event["event"] == "start_failed"]
    assert max(event["failed_in_a_row"] for event in failed) >= 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_workers_that_reserved_a_gpu_do_not_compute_on_the_cpu(tmp_path: Path) -> None:
    job = Job(tmp_path, None)
    exit_code, output = job.wait()
    assert exit_code == 1
    assert "the device is 'cuda' and this process sees no CUDA device: torch" in output, output
    assert not job.count("actor_ready")


@pytest.mark.slow
@pytest.mark.skipif(not isas(), reason="no kernels on this CPU whose sums are the same in parts")
def test_a_worker_of_two_gpus_has_a_rank_on_each(tmp_path: Path) -> None:
    job = Job(tmp_path, None, {"gpus": 2}, MORAY_DEVICE="cpu")
    exit_code, output = job.wait()
    assert exit_code == 0, output
    assert all(row["error"] is None for row in read_output(tmp_path))
    (ready,) = [event for event in job.events() if event["event"] == "actor_ready"]
    assert ready["devices"] == 2
    assert json.loads((tmp_path / "out/_job/status.json").read_text())["worker_gpus"] == 2
