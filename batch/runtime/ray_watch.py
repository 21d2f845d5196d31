"""Watches a Ray for the loss of a process without which it cannot run, which Ray itself notices after minutes.

RayWatchByParent is for the driver of a job, which a parent process can restart; RayWatchByThread is for an endpoint,
which has no parent.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Protocol

from moray.batch.processes.descendants import end_programs
from moray.batch.processes.process import is_alive, start_time
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.runtime.ray_choice import remove_folder
from moray.batch.runtime.ray_internals import gcs_address, watched_starts
from moray.engine.errors import JobError, MorayError

NEEDED = {"gcs_server": "GCS", "raylet": "raylet"}  # Ray's name of a process -> the name in its documentation
LOSS_POLL_S = 1.0  # between two looks at whether Ray's processes are there
GCS_CONNECT_S = 5.0  # seconds allowed for connecting to a GCS that may be lost
TIMED_OUT = "timed out during startup"  # Ray's message where the raylet has not come up within 30 s, on a busy machine


class RayWatch(Protocol):
    """Watches the Ray that this process starts."""

    def starting(self, folder: Path) -> AbstractContextManager[None]:
        """Return the context in which that Ray is started.

        folder:  the folder of that Ray, which holds nothing else
        """


class RayProcesses:
    """Records the processes without which a Ray that this process starts cannot run."""

    def __init__(self) -> None:
        self._processes: dict[str, tuple[int, str]] = {}  # by name: process id, and its start time

    def __bool__(self) -> bool:
        return bool(self._processes)

    def add(self, process_type: str, pid: int) -> str | None:
        """Record a process that was started; return its name, or None where Ray can run without it."""
        name = NEEDED.get(process_type)
        if name is not None:
            self._processes[name] = pid, start_time(pid)
        return name

    def lost(self) -> str | None:
        """Return the name of a process that is gone; None while all are there."""
        return next((name for name, process in self._processes.items() if not is_alive(*process)), None)


class RayWatchByThread:
    """Watches the Ray that this process starts, from a thread, and ends this process when that Ray is lost.

    Ray itself would end it after a minute of silence.

    on_loss:  called in the watch's thread with the name of the process that is gone; returns the exit code
    """

    def __init__(self, on_loss: Callable[[str], int]) -> None:
        self._on_loss = on_loss
        self._processes = RayProcesses()
        self._is_over = Event()

    @contextmanager
    def starting(self, folder: Path) -> Iterator[None]:
        """Watch the processes of the Ray that is started in the context, from then on.

        folder:  the folder of that Ray, which is removed if it is lost
        """
        with watched_starts(self._processes.add):
            yield
        Thread(target=self._watch, args=(folder,), name="ray-loss", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: Ray is about to end in good order."""
        self._is_over.set()

    def _watch(self, folder: Path) -> None:
        while not self._is_over.wait(LOSS_POLL_S):
            if (lost := self._processes.lost()) is not None:
                exit_code = self._on_loss(lost)
                end_programs(str(folder))
                remove_folder(folder)
                os._exit(exit_code)


class MonitorLost(JobError):
    """Means that the job's monitor actor is gone, and with it the state of all others: the run cannot continue."""


class RayWatchByParent:
    """Has the parent process watch the Ray that this process starts, from the start of its processes to its shutdown.

    Ray's own time limits do not help: a driver whose GCS is dead exits after a minute without a message, and one whose
    raylet is dead continues for minutes and then fails with an error that names an actor.
    """

    def __init__(self, link: DriverLink) -> None:
        self._link = link
        self._processes = RayProcesses()

    @contextmanager
    def starting(self, folder: Path) -> Iterator[None]:
        """Report each process of the Ray that is started in the context, at once: it may die before Ray is up.

        folder:  the folder of that Ray
        """

        def on_start(process_type: str, pid: int) -> None:
            if (name := self._processes.add(process_type, pid)) is not None:
                self._link.report_ray(str(folder), name, pid)

        try:
            with watched_starts(on_start), self._ending_without_ray():
                yield
        except BaseException:
            self._link.report_ray_shutdown()  # the processes that were started end with this process
            raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch a Ray that is up. Use this inside ray_session.

        Raises JobError in place of Ray's exception where a cluster that was there before is lost.
        """
        self._link.report_ray_up()
        if not self._processes:
            with self._ending_without_ray(), _explain_lost_cluster():
                yield
            return
        try:
            with self._ending_without_ray():
                yield
        finally:
            self._link.report_ray_shutdown()

    @contextmanager
    def _ending_without_ray(self) -> Iterator[None]:
        """End this process on an exception that follows from the loss of one of Ray's processes.

        The cause is the death of a process, of Ray or of the monitor, or a machine too busy to start it. That is no
        reason for the job to fail: the parent process starts another driver.
        """
        try:
            yield
        except Exception as error:
            lost, what = self._processes.lost(), "died"
            if lost is None and TIMED_OUT in str(error):
                lost, what = NEEDED["raylet"], "did not come up in time"
            whose = "the local Ray"
            if lost is None and isinstance(error, MonitorLost):
                lost, whose = "monitor actor", whose if self._processes else "the job"
            if lost is not None and self._link.is_watched:
                self._link.report_ray_loss(f"{lost} of {whose}", what)
                os._exit(1)
            raise


@contextmanager
def _explain_lost_cluster() -> Iterator[None]:
    """Raise JobError in place of Ray's exception where the cluster does not answer any more."""
    address = gcs_address()
    try:
        yield
    except Exception as error:
        if isinstance(error, MorayError) and not isinstance(error, MonitorLost):
            raise
        host, _, port = address.rpartition(":")
        if not port.isdecimal():
            raise
        try:
            socket.create_connection((host.strip("[]"), int(port)), GCS_CONNECT_S).close()
        except OSError:
            raise JobError(
                f"the Ray cluster at {address} does not answer any more: its head or its GCS was lost. Run the job "
                "again on a cluster that is there"
            ) from error
        raise
