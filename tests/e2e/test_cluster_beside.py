"""A Ray cluster that others run on this machine: it is joined where that is asked for, and otherwise left alone."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import pytest
from made_jobs import make_spec, read_output, write_input
from moray_run import MorayRun
from moray_serve import MorayServe
from patience import PATIENCE_S
from ports import free_port
from ray_cluster import TOKEN, RayNodes

from moray.batch.spec import JobSpec

NAME = "Résumés \N{EM DASH} 履歴書 \N{SLIGHTLY SMILING FACE}" + " long" * 60
TOKENS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
# A driver that joins: what others have run there, and what runs.
LOOK = """
import json, sys, ray
from ray import serve
from ray._private import state
ray.init(address=sys.argv[1], namespace="look", logging_level="ERROR", log_to_driver=False)
assert ray.get(ray.remote(num_cpus=0)(lambda: 41 + 1).remote()) == 42
jobs = [job["Entrypoint"] for job in state.jobs()]
applications = {name: found.status for name, found in serve.status().applications.items()}
try:
    has_serve = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve") is not None
except ValueError:
    has_serve = False
print(json.dumps({"jobs": jobs, "applications": applications, "has_serve": has_serve}))
"""
OTHER = """
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False)

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    async def __call__(self, request):
        return "still here"

serve.start(http_options={"port": int(sys.argv[2])})
serve.run(Other.bind(), name="other", route_prefix="/")
"""


class ClusterBeside(RayNodes):
    """A cluster of one node, and its files.

    session:  the folder of its session
    found:    a folder in which Ray looks for the address of the cluster that `ray start` has started last
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--include-dashboard=false")
        (self.session,) = (path for path in folder.glob("1/session_*") if not path.is_symlink())
        self.found = folder / "found"
        (self.found / "ray").mkdir(parents=True)
        (self.found / "ray/ray_current_cluster").write_text(self.gcs_address)
        self.look()  # it is up, and all of its files are there

    def look(self) -> Any:
        """Return what runs there. Ray gives a cluster seconds to answer; on a busy machine that may take longer."""
        end_s = time.monotonic() + PATIENCE_S
        while (done := self.python("-c", LOOK, self.gcs_address)).returncode:
            is_busy = "Failed to connect to Ray cluster" in done.stderr and time.monotonic() < end_s
            assert is_busy, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def jobs_of_moray(self) -> int:
        return sum("moray" in job for job in self.look()["jobs"])

    def files(self) -> set[str]:
        """Return what a cluster has from its start to its end, and what a job may have left with it."""
        return {path.name for path in [*self.session.iterdir(), *(self.session / "sockets").iterdir()]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterBeside]:
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = ClusterBeside(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


Start = Callable[..., MorayRun]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `moray run` in a new folder, on a job of eight rows."""
    runs: list[MorayRun] = []

    def begin(environment: dict[str, str], cwd: Path | None = None) -> MorayRun:
        folder = tmp_path / str(len(runs))
        write_input(folder / "in/a.parquet", {"prompt": [f"{i} + 3 =" for i in range(8)]})
        runs.append(MorayRun(folder, small_job(folder), environment=environment, cwd=cwd))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean()


def small_job(folder: Path) -> JobSpec:
    return make_spec(folder, name=NAME)


@pytest.mark.slow
def test_two_runs_of_their_own_leave_the_cluster_and_each_other_alone(
    cluster: ClusterBeside, start: Start, tmp_path: Path
) -> None:
    """One in a folder with the user's own modules of common names; one where TMPDIR is as long as Slurm's."""
    own, long = tmp_path / "own", tmp_path / ("x" * 80)
    own.mkdir()
    long.mkdir()
    for name in ("batch", "engine", "jobs", "kernels", "serve"):
        (own / f"{name}.py").write_text("raise SystemExit('this is the user\\'s own module')\n")
    files = cluster.files()
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as short:
        joined_by_accident = {"RAY_TMPDIR": str(cluster.found), "PYTHONPATH": str(own), **TOKENS}
        runs = [
            start(joined_by_accident, own),
            start({"RAY_TMPDIR": str(long), "TMPDIR": short, "RAY_ADDRESS": ""}),
        ]
        ends = [run.end() for run in runs]
        assert [code for code, _ in ends] == [0, 0], ends
        assert f"Ray's files go to {short}: RAY_TMPDIR {long} is " in ends[1][1]
        assert [run.left() for run in runs] == [[], []]
        assert (os.listdir(short), os.listdir(cluster.found), os.listdir(long)) == ([], ["ray"], [])
    assert read_output(runs[0].folder) == read_output(runs[1].folder)
    assert runs[0].status()["name"] == NAME
    assert cluster.files() == files
    assert cluster.jobs_of_moray() == 0


@pytest.mark.slow
def test_a_job_joins_the_cluster_that_ray_address_names(cluster: ClusterBeside, start: Start) -> None:
    files = cluster.files()
    run = start({"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(cluster.found), **TOKENS})
    code, output = run.end()
    assert code == 0, output
    # Ray may have noted its cluster by this machine's address in the network.
    port = cluster.gcs_address.rpartition(":")[2]
    assert re.search(rf"^Using the Ray cluster at \S+:{port}, as RAY_ADDRESS says\.$", output, re.MULTILINE), output
    assert run.left() == []
    assert cluster.files() == files, "the journal is removed"
    assert cluster.jobs_of_moray() == 1


@pytest.mark.slow
def test_the_endpoint_leaves_other_applications_alone(cluster: ClusterBeside) -> None:
    port = free_port()
    deployed = cluster.python("-c", OTHER, cluster.gcs_address, str(port))
    assert deployed.returncode == 0, deployed.stderr
    environment = {"RAY_ADDRESS": cluster.gcs_address, **TOKENS}
    endpoint = MorayServe("--dtype", "float32", "--set", f"name={NAME}", environment=environment)
    try:
        endpoint.wait_ready()
        with urlopen(f"{endpoint.url}/v1/models", timeout=PATIENCE_S) as reply:
            assert json.loads(reply.read())["data"][0]["id"] == NAME
        applications = cluster.look()["applications"]
        assert len(applications) == 2 and set(applications.values()) == {"RUNNING"}
    finally:
        os.killpg(endpoint.process.pid, signal.SIGINT)
        code, output = endpoint.end()
    assert code == 0, output
    assert cluster.look()["applications"] == {"other": "RUNNING"}
    with urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE_S) as reply:
        assert reply.read() == b"still here"


@pytest.mark.slow
def test_the_endpoint_ends_the_serve_that_it_has_started() -> None:
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = ClusterBeside(Path(folder))
        try:
            endpoint = MorayServe("--dtype", "float32", environment={"RAY_ADDRESS": cluster.gcs_address, **TOKENS})
            endpoint.wait_ready()
            assert cluster.look()["has_serve"]
            assert endpoint.stop()[0] == 0
            found = cluster.look()
            assert (found["applications"], found["has_serve"]) == ({}, False)
        finally:
            cluster.stop()
