"""Ray's autoscaler, as it is, with what `moray submit --kuberay` makes: workers come for a job, spot first, and go."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE_S
from ports import free_port
from rendered import K8S, render
from repository import ROOT
from small_kubernetes import SmallKubernetes

from moray.batch.spec import JobSpec
from moray.jobs.clusters.rayjob import make_rayjob

IDLE_S = 5
SPOT_NODES = 1
GIVEN_BACK_S = 60
CLUSTER = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "moray", "namespace": "moray"}}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: the names of Ray's sockets have a limit."""
    made = Path(tempfile.mkdtemp(prefix="as-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
def test_job_gets_workers_and_gives_them_back(folder: Path) -> None:
    workers = {"min": SPOT_NODES + 1, "max": SPOT_NODES + 1, "accelerator": "A100", "labels": {"team": "a"}}
    spec = JobSpec.model_validate({
        "model": {"path": "/models/tiny-phimoe"}, "input": {"path": "/data/prompts"}, "output": {"path": "/data/out"},
        "sampling": {"max_tokens": 8}, "workers": workers,
    })  # fmt: skip
    objects = make_rayjob(render(K8S / "overlays/aks/batch"), spec, "job")
    (cluster,) = (CLUSTER | {"spec": o["spec"]["rayClusterSpec"]} for o in objects if o["kind"] == "RayJob")
    (job,) = (yaml.safe_load(o["data"]["job.yaml"]) for o in objects if o["kind"] == "ConfigMap")
    for group in cluster["spec"]["workerGroupSpecs"]:
        group["idleTimeoutSeconds"] = IDLE_S
        if group["groupName"] == "gpu-spot":
            group["maxReplicas"] = SPOT_NODES  # there are no more of them today
    port = free_port()
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT / "src"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "MORAY_DEVICE": "cpu",  # nodes only say that they have GPUs
        "RAY_enable_autoscaler_v2": "1",
        "RAY_raylet_start_wait_time_s": "180",
    }
    for section, path in (
        ("model", "examples/tiny-phimoe"),
        ("input", "examples/prompts"),
        ("output", folder / "answers"),
    ):
        job[section]["path"] = str(path)
    (folder / "job.yaml").write_text(yaml.safe_dump(job))

    with SmallKubernetes(cluster, env, folder, port) as kubernetes:
        assert kubernetes.workers == []
        address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "moray.jobs.cli", "run", folder / "job.yaml", "--address", address]
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"{error}\n{error.stdout}\n{kubernetes.history}\n{_logs(folder)}")
        assert done.returncode == 0, done.stdout + done.stderr + _logs(folder)
        status = json.loads((folder / "answers" / "_job" / "status.json").read_text())
        assert (status["state"], status["pending_rows"]) == ("SUCCEEDED", 0)
        grown = [replicas for replicas in kubernetes.history if replicas["gpu-spot"] or replicas["gpu"]]
        assert grown[0]["gpu-spot"] == SPOT_NODES
        assert max(replicas["gpu"] for replicas in grown) == 1
        until = time.monotonic() + GIVEN_BACK_S
        while (kubernetes.workers or any(kubernetes.replicas.values())) and time.monotonic() < until:
            time.sleep(0.5)
        if kubernetes.workers or any(kubernetes.replicas.values()):
            command = [sys.executable, str(Path(sys.executable).parent / "ray"), "status", "-v", "--address", address]
            why = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S).stdout
            pytest.fail(f"{kubernetes.workers} are still there\n{kubernetes.history}\n{why}")


def _logs(folder: Path) -> str:
    paths = [
        *folder.glob("*.log"),
        *folder.glob("answers/_job/events/*"),
        *folder.glob("ray/session_latest/logs/monitor.log"),
    ]
    return "".join(f"\n== {path.name}\n{path.read_text()[-5000:]}" for path in paths)
