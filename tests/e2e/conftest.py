"""One local Ray for all jobs that can share one. It has a single CPU: what runs there runs anywhere."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def one_cpu() -> Iterator[None]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


class Watcher:
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.statuses: list[Any] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def update(self, status: Any) -> None:
        self.statuses.append(status)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()
