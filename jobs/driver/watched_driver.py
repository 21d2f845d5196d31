"""WatchedDriver: the state of a driver in the parent process that started it, from the driver's reports."""

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moray.batch.processes.exit_reason import describe_exit, read_exit_status
from moray.batch.processes.process import start_time
from moray.batch.runtime.ray_choice import find_folders, remove_folder


@dataclass(frozen=True)
class StartedRun:
    """Describes a run that has claimed its output folder.

    num_committed:  parts that were committed at that time
    began_s:        start of the job on the monotonic clock: of the first of the runs that one command starts
    """

    output: str
    run: str
    spec: str
    is_retry: bool
    num_committed: int
    max_restarts: int
    began_s: float


@dataclass
class WatchedDriver:
    """Holds what the parent process knows of a driver.

    pid:            its process id
    channel:        socket to the driver: reports come in, signals go out
    token:          marks its processes and the folder of its Ray
    status:         status from waitpid; None while the driver lives
    run:            its run; None before it has claimed the output folder
    has_committed:  it has committed a part since it was started
    ray:            pidfd of a process of its local Ray -> name and process id
    ray_folder:     folder of that Ray; empty before it starts one
    is_ray_up:      that Ray has started
    exit_code:      exit code that it reported; None where it died without a report
    error:          reason that it reported
    lost_ray:       what happened to its Ray, if it ended because of that
    """

    pid: int
    channel: socket.socket
    token: str
    status: int | None = None
    run: StartedRun | None = None
    has_committed: bool = False
    ray: dict[int, tuple[str, int]] = field(default_factory=dict)
    exit_code: int | None = None
    error: str = ""
    lost_ray: str | None = None
    ray_folder: str = ""
    is_ray_up: bool = False
    _unread: bytes = b""

    @property
    def descriptors(self) -> list[int]:
        """Return the file descriptors to wait for."""
        return [*([] if self.channel.fileno() < 0 else [self.channel.fileno()]), *self.ray]

    def read_reports(self) -> None:
        """Read and apply all reports that have arrived."""
        try:
            while content := self.channel.recv(65536, socket.MSG_DONTWAIT):
                self._unread += content
            self.channel.close()  # the driver's end is closed
        except OSError:  # nothing more for now, or closed already
            pass
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._apply(json.loads(line))

    def forward_signals(self, signals: bytes) -> None:
        """Send the numbers of signals to the driver, one byte each."""
        with suppress(OSError):
            self.channel.sendall(signals)

    def end_without_ray(self, descriptor: int, oom_kills: int | None) -> None:
        """Kill the driver when a process of its Ray has died: it would run on for minutes, or fail with a misleading
        reason. If the driver itself has died, its Ray ends with it, and nothing is recorded."""
        name, pid = self.ray[descriptor]
        if not start_time(self.pid):
            self.forget_ray()
            return
        status = read_exit_status(pid)
        self._lose_ray(f"{name} of the local Ray", "died" if status is None else describe_exit(status, oom_kills))
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def forget_ray(self) -> None:
        """Stop to watch the processes of its Ray."""
        for descriptor in self.ray:
            os.close(descriptor)
        self.ray.clear()

    def remove_ray_folders(self) -> None:
        """Delete the files of its local Ray. A driver that died while Ray started has not reported their folder, so
        folders with the driver's token are deleted too."""
        if self.ray_folder:
            remove_folder(Path(self.ray_folder))
        for folder in find_folders(self.token):
            remove_folder(folder)

    def _apply(self, report: dict[str, Any]) -> None:
        match report.pop("what"):
            case "run":
                self.run = StartedRun(**report)
            case "commit":
                self.has_committed = True
            case "ray":
                self.ray_folder = report["folder"]
                with suppress(OSError, AttributeError):  # not on Linux: Ray's own timeouts apply
                    self.ray[os.pidfd_open(report["pid"])] = report["process"], report["pid"]
            case "ray_up":
                self.is_ray_up = True
            case "ray_shutdown":
                self.forget_ray()
            case "ray_loss":
                self._lose_ray(report["process"], report["how"])
            case "exit":
                self.exit_code, self.error = report["code"], report["error"]

    def _lose_ray(self, name: str, how: str) -> None:
        """Record the loss of a process, unless one was lost before. name: its name, and whose it is"""
        when = "" if self.is_ray_up else " while that started"
        self.lost_ray = self.lost_ray or f"the {name} {how}{when}"
        self.forget_ray()
