"""DriverLink: the driver's end of the connection to its parent process (jobs/driver/driver_process.py).

The driver reports what the parent must know to restart it; the parent passes on the signals that it receives.
"""

import json
import os
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from threading import Thread, main_thread
from typing import Any

from moray.batch.runtime.signals import RECEIVER
from moray.batch.status.restart import Restart

WAKE_SIGNAL = signal.SIGUSR1  # makes the main thread handle the signals that the parent passed on
WAKE_EVERY_S = 0.2  # seconds between two attempts to wake the main thread
ORPHAN_S = 60.0  # seconds after which a driver without a parent process ends itself


class DriverLink:
    """Sends reports to the parent process; does nothing where there is none.

    channel:  the socket to the parent process
    restart:  why this driver was started in place of another one; None at the first start
    token:    a name for what this driver alone creates: its processes and the folder of its Ray; None without a parent
    """

    def __init__(
        self, channel: socket.socket | None = None, restart: Restart | None = None, token: str | None = None
    ) -> None:
        self._channel = channel
        self.restart = restart
        self.token = token
        self._signals: deque[int] = deque()

    @property
    def is_watched(self) -> bool:
        """Return whether a parent process restarts this one when it dies."""
        return self._channel is not None

    def listen(self) -> None:
        """Start to handle signals from the parent process, in the main thread.

        When the parent is gone, the job is stopped at once: whoever killed the parent wants the job to end.
        """
        signal.signal(WAKE_SIGNAL, lambda _number, _frame: self._handle_signals())
        Thread(target=self._listen, name="parent", daemon=True).start()

    def report_run(
        self,
        output: str,
        run: str,
        *,
        is_retry: bool,
        num_committed: int,
        max_restarts: int,
        spec: str,
        began_s: float,
    ) -> None:
        """Report that a run has claimed its output folder: from now on there is a job to continue.

        num_committed:  parts that exist
        max_restarts:   how often the driver may be restarted
        spec:           the job's spec as YAML
        began_s:        as in Restart.began_s
        """
        absolute = output if "://" in output else os.path.abspath(output)
        limits = {"num_committed": num_committed, "max_restarts": max_restarts}
        self._send("run", output=absolute, run=run, is_retry=is_retry, **limits, spec=spec, began_s=began_s)

    def report_commit(self) -> None:
        """Report that a part was committed."""
        self._send("commit")

    def report_ray(self, folder: str, process: str, pid: int) -> None:
        """Report the start of a process of the local Ray without which the job cannot continue.

        folder:   the folder of that Ray's files, which holds nothing else
        process:  the process's name
        """
        self._send("ray", folder=folder, process=process, pid=pid)

    def report_ray_up(self) -> None:
        """Report that Ray has started, or that the driver has joined a cluster."""
        self._send("ray_up")

    def report_ray_shutdown(self) -> None:
        """Report that the local Ray is about to be shut down in an orderly way."""
        self._send("ray_shutdown")

    def report_ray_loss(self, process: str, how: str = "died") -> None:
        """Report that the driver was first to notice that a process is lost without which it cannot continue.

        process:  the process's name, and whose it is
        how:      what the process did, as a verb in the past tense
        """
        self._send("ray_loss", process=process, how=how)

    def report_exit(self, code: int, error: str = "") -> None:
        """Report the exit code, once the job is settled or the driver ends by itself.

        error:  the last line of the error, where there is one
        """
        self._send("exit", code=code, error=error)

    def _send(self, what: str, **fields: Any) -> None:
        if self._channel is not None:
            with suppress(OSError):  # the parent is gone; the listening thread handles that
                self._channel.sendall(json.dumps({"what": what} | fields).encode() + b"\n")

    def _listen(self) -> None:
        assert self._channel is not None
        with suppress(OSError):
            while numbers := self._channel.recv(64):
                self._wake_main_thread(*numbers)
        Thread(target=self._end_orphan, name="orphan", daemon=True).start()
        self._wake_main_thread(signal.SIGKILL, signal.SIGKILL)  # a second signal ends the job at once

    def _end_orphan(self) -> None:
        main_thread().join(ORPHAN_S)
        os._exit(128 + signal.SIGKILL)

    def _wake_main_thread(self, *numbers: int) -> None:
        """Queue the signals, and signal the main thread until it has handled them.

        One signal is not enough: what arrives just before the main thread waits in a system call does not wake it.
        """
        self._signals.extend(numbers)
        while self._signals and main_thread().is_alive():
            with suppress(ProcessLookupError):
                signal.pthread_kill(main_thread().ident or 0, WAKE_SIGNAL)
            time.sleep(WAKE_EVERY_S)

    def _handle_signals(self) -> None:
        while self._signals:
            RECEIVER.on_forwarded(self._signals.popleft())
