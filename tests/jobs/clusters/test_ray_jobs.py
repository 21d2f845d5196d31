"""Jobs on a real cluster of two nodes: submitted, watched, killed, submitted again, cancelled."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec, read_output, write_input
from patience import PATIENCE_S
from ray_cluster import RayCluster

from moray.batch.output.verify import verify
from moray.batch.spec import JobSpec
from moray.jobs.clusters.kuberay import ray_job
from moray.jobs.clusters.submission import next_id

pytestmark = pytest.mark.slow
LONG_ROWS = 480


def small_job(folder: Path, **sections: Any) -> Path:
    write_input(folder / "in/a.parquet", {"prompt": ["1 + 1 =", "2 + 2 =", None]})
    return save(folder, make_spec(folder, **sections))


def long_job(folder: Path) -> Path:
    """Make a job of thirty shards, so that it still runs after two commands have started."""
    prompts = [f"{i} sheep, {i % 7} lions:" for i in range(LONG_ROWS)]
    write_input(folder / "in/a.parquet", {"prompt": prompts})
    sampling = {"max_tokens": 100, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    return save(
        folder,
        make_spec(folder, name="a long job", sampling=sampling, engine={"max_num_seqs": 16}, workers={"gpus": 0}),
    )


def save(folder: Path, spec: JobSpec) -> Path:
    path = folder / "job.yaml"
    path.write_text(spec.to_yaml())
    return path


def wait_for(what: Callable[[], Any], folder: Path) -> None:
    """Wait for a condition. Fails where a run of the job ends before."""
    end_s = time.monotonic() + PATIENCE_S
    ended = sum(event["event"] == "ended" for event in events(folder))
    while not what():
        assert sum(event["event"] == "ended" for event in events(folder)) == ended, events(folder)
        assert time.monotonic() < end_s
        time.sleep(0.1)


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of all runs, the first run first."""
    paths = sorted((folder / "out/_job/events").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def commits(folder: Path) -> int:
    """Count the commits that drivers reported, over all runs. Actors may outlive a killed driver by a part or two."""
    return sum(event["event"] == "committed" for event in events(folder))


def parts(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").glob("part-*.parquet")}


def test_submit_and_watch(cluster: RayCluster, tmp_path: Path) -> None:
    workers = {"accelerator": "A100", "labels": {"disk": "fast"}, "io_labels": {"disk": "!fast"}}
    # Long enough for its actors to be reported before it is over.
    sampling = {"max_tokens": 200, "ignore_eos": True}
    spec = str(small_job(tmp_path, name="sums & more 履歴書", workers=workers, sampling=sampling))
    at = ("--address", cluster.address)
    first = cluster.moray("submit", spec, *at)
    assert (first.returncode, first.stderr) == (0, ""), first.stdout
    submission = re.findall(r"^Submitted (sums-more-[0-9a-f]{8}-1) ", first.stdout)[0]
    assert "sums & more 履歴書 SUCCEEDED\n  2 of 3 rows ok, 1 failed (null_input 1)\n" in first.stdout
    assert verify(str(tmp_path / "out")).closes
    nodes = {event["stage"]: event["node"] for event in events(tmp_path) if event["event"] == "actor_ready"}
    assert nodes["prepare"] == nodes["commit"] != nodes["worker"]

    log = cluster.moray("logs", "sums & more 履歴書", *at)
    assert log.returncode == 0 and log.stdout in first.stdout
    status = cluster.moray("status", submission, *at)
    assert status.stdout.startswith(
        f"{submission} SUCCEEDED on the cluster\nsums & more 履歴書 SUCCEEDED\n  2 of 3 rows ok"
    )
    watched = cluster.moray("status", submission, "--watch", *at)
    assert watched.returncode == 0 and watched.stdout.startswith("sums & more 履歴書 SUCCEEDED\n"), watched.stderr
    listed = cluster.moray("list", RAY_API_SERVER_ADDRESS=cluster.address)
    assert re.search(rf"{submission} +SUCCEEDED +3/3 rows ", listed.stdout), listed.stdout + listed.stderr
    alone = cluster.moray("status", str(tmp_path / "out"))
    assert alone.returncode == 0 and alone.stdout.startswith("sums & more 履歴書 SUCCEEDED\n")
    over = cluster.moray("cancel", submission, *at)
    assert (over.returncode, over.stdout) == (0, f"{submission} is over already: SUCCEEDED\n")


def test_submit_again_and_with_another_spec(cluster: RayCluster, tmp_path: Path) -> None:
    spec, at = str(small_job(tmp_path)), ("--address", cluster.address)
    first = cluster.moray("submit", spec, *at)
    submission = first.stdout.split()[1]
    again = cluster.moray("submit", spec, "--installed", *at)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert again.stdout.startswith(f"Submitted {submission[:-1]}2 ")

    changed = cluster.moray("submit", spec, "--set", "sampling.temperature=0.5", *at)
    assert changed.returncode == 2 and "sampling.temperature: 0.0 -> 0.5" in changed.stdout


def lease(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out/_job/lease.json").read_text()))


def is_held(folder: Path) -> bool:
    return (folder / "out/_job/lease.json").exists()


def status_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out/_job/status.json").read_text()))


def test_kill_the_driver_submit_again_and_cancel(cluster: RayCluster, tmp_path: Path) -> None:
    spec, at = str(long_job(tmp_path)), ("--address", cluster.address)
    submitted = cluster.moray("submit", spec, "--detach", *at)
    assert submitted.returncode == 0, submitted.stderr
    submission = submitted.stdout.split()[1]
    wait_for(lambda: len(parts(tmp_path)) >= 2, tmp_path)
    second = cluster.moray("submit", spec, *at)
    assert second.returncode == 2
    assert f"{tmp_path}/out is being written by {submission}. Follow it: moray logs {submission}" in second.stderr

    driver = lease(tmp_path)["pid"]
    os.kill(driver, signal.SIGKILL)
    wait_for(lambda: lease(tmp_path)["pid"] != driver and status_of(tmp_path)["restarts"] == 1, tmp_path)
    os.kill(lease(tmp_path)["parent"], signal.SIGKILL)
    killed = cluster.moray("logs", "--follow", "a long job", *at)
    assert killed.returncode == 1
    assert "The driver was killed by SIGKILL" in killed.stdout and "continues the job (restart 1)" in killed.stdout
    end_s = time.monotonic() + PATIENCE_S
    while is_held(tmp_path):  # by the driver, which ends itself
        assert time.monotonic() < end_s
        time.sleep(0.1)
    status = cluster.moray("status", "a long job", *at).stdout
    assert f"{submission} FAILED on the cluster: " in status and "a long job CANCELLED: SIGKILL" in status

    kept, num_commits = parts(tmp_path), commits(tmp_path)
    assert cluster.moray("submit", spec, "--detach", *at).returncode == 0
    wait_for(lambda: commits(tmp_path) > num_commits, tmp_path)
    cancelled = cluster.moray("cancel", "a long job", *at)
    assert (cancelled.returncode, cancelled.stdout.splitlines()[-1]) == (0, f"{submission[:-1]}2 STOPPED")
    left = json.loads(cluster.moray("status", str(tmp_path / "out"), "--json").stdout)
    assert (left["state"], left["reason"]) == ("CANCELLED", "SIGTERM")
    assert left["committed_shards"] == len(parts(tmp_path)) < left["shards"]

    last = cluster.moray("submit", spec, *at)
    assert last.returncode == 0, last.stdout
    assert kept <= parts(tmp_path) and verify(str(tmp_path / "out")).closes
    assert len(read_output(tmp_path)) == LONG_ROWS


def test_a_worker_that_finds_no_node(cluster: RayCluster, tmp_path: Path) -> None:
    workers = {"accelerator": "H100", "labels": {"disk": "slow"}, "start_timeout_s": 6}
    run = cluster.moray("submit", str(small_job(tmp_path, workers=workers)), "--address", cluster.address)
    assert run.returncode == 1
    assert (
        "no actor of worker was ready within 6 s (workers.start_timeout_s): no node has 1 GPU (H100) and 0.5 CPUs and "
        "the labels disk=slow; the cluster has 1 x 1 CPUs, 1 x 1 CPUs and 1 GPUs (A100)\n"
    ) in run.stdout, run.stdout


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("input", r"/unshared/in is not there on \S+; give an address such as s3://bucket/folder, or a path on a disk"),
        ("output", r"/unshared/out on \S+ is not the folder that the driver sees"),
    ],
    ids=["input", "output"],
)
def test_a_node_that_does_not_see_a_folder(cluster: RayCluster, tmp_path: Path, section: str, message: str) -> None:
    if cluster.unshared is None:
        pytest.skip("this machine lets nobody mount a folder for some processes alone")
    spec = small_job(tmp_path, workers={"io_labels": {"disk": "fast"}})
    there = cluster.unshared / section.removesuffix("put")
    if section == "input":
        (tmp_path / "in").rename(there)
    run = cluster.moray("submit", str(spec), f"--set={section}.path={there}", "--address", cluster.address)
    assert run.returncode == 2 and re.search(message, run.stdout), run.stdout + run.stderr


@pytest.mark.parametrize("by", ["moray", "kuberay"])
def test_a_job_that_is_stopped_has_time_to_commit(cluster: RayCluster, tmp_path: Path, by: str) -> None:
    """Ray alone would kill the job after 3 s. On Kubernetes Ray's own command stops it, in the head pod."""
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent/stop.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(5)\n    pathlib.Path(sys.argv[1]).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1] + '.ready').touch()\ntime.sleep(600)\n"
    )
    code = (
        "import sys; from pathlib import Path\n"
        "from moray.jobs.clusters.ray_jobs import RayCluster; from moray.jobs.commands.submit import *\n"
        "cluster = RayCluster(sys.argv[1])\n"
        "entrypoint, folder = f'python stop.py {sys.argv[2]}/kept', Path(sys.argv[2], 'sent')\n"
        "cluster.submit('stopped', sys.argv[2], entrypoint, folder, {STOP_WAIT: str(STOP_WAIT_S)})\n"
    )
    assert cluster.python("-c", code, cluster.address, str(tmp_path)).returncode == 0
    wait_for((tmp_path / "kept.ready").exists, tmp_path)
    if by == "moray":
        cancelled = cluster.moray("cancel", "stopped", "--address", cluster.address)
    else:
        submission = next_id("stopped", str(tmp_path), [])
        command = ray_job("stop", submission, address=cluster.address)
        cancelled = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert cancelled.returncode == 0 and (tmp_path / "kept").exists()


def test_without_the_token_nobody_comes_in(cluster: RayCluster, tmp_path: Path) -> None:
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "b" * 64}):
        refused = cluster.moray("list", "--address", cluster.address, **variables)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"{cluster.address} denies access" in refused.stderr
        assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token." in refused.stderr


def test_a_job_that_the_cluster_does_not_know(cluster: RayCluster) -> None:
    unknown = cluster.moray("logs", "nothing", "--address", cluster.address)
    assert unknown.returncode == 2 and "has no job 'nothing'" in unknown.stderr
