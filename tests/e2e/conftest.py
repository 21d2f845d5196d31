"""One local Ray for all jobs that can share one. It has a single CPU: what runs there runs anywhere."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moray_run import MorayRun
from watcher import Watcher

from moray.batch.spec import JobSpec


@pytest.fixture(scope="session")
def one_cpu() -> Iterator[None]:
    import ray

    often = {"metrics_report_interval_ms": 1000}  # for what asks for metrics
    ray.init(
        num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _system_config=often
    )
    yield
    # A job that was aborted leaves Ray Data to find out; a shutdown meanwhile would end its thread by an exception.
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(60)
    ray.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., MorayRun]]:
    """Starts `moray run` on a spec, on a terminal where one is given; what still runs when the test is over is
    killed."""
    runs: list[MorayRun] = []

    def begin(spec: JobSpec, terminal: int | None = None) -> MorayRun:
        runs.append(MorayRun(tmp_path, spec, terminal=terminal))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()
