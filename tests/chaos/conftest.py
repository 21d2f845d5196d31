"""Runs that are cleaned up whatever became of them, and a cluster whose nodes may be killed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import left_behind
import pytest
from hold import Hold
from moray_run import MorayRun
from ray_cluster import RayNodes

from moray.batch.spec import JobSpec

# Ray finds out in two seconds that a node is lost, not in half a minute.
QUICK = '--system-config={"health_check_period_ms":500,"health_check_failure_threshold":4}'


@pytest.fixture
def nodes(hold: Hold) -> Iterator[RayNodes]:
    """A head and a second node. What runs on them heeds `hold`, whose environment they are started with."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = RayNodes(Path(folder), "--include-dashboard=false", QUICK)
        try:
            nodes.add()
            yield nodes
        finally:
            nodes.stop()
        left_behind.wait_until_gone(nodes.tag)


@pytest.fixture
def start() -> Iterator[Callable[..., MorayRun]]:
    """Starts `moray run`; arguments as MorayRun's."""
    runs: list[MorayRun] = []

    def begin(folder: Path, spec: JobSpec, nodes: RayNodes | None = None) -> MorayRun:
        address, environment = (None, None) if nodes is None else (nodes.gcs_address, nodes.environment)
        runs.append(MorayRun(folder, spec, address, environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean()
