"""Lease: which run is writing to an output folder.

It is advisory: two runs at once do no harm, they only do the work twice. The holder rewrites _job/lease.json every few
seconds. A holder that is dead, or has not rewritten it for half a minute, has lost the lease. Clocks of machines
differ, so what counts is whether the file changes while it is watched.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Event, Thread

from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.processes.process import is_alive, start_time
from moray.engine.errors import OutputError

LEASE = f"{JOB}/lease.json"
HEARTBEAT_S = 5.0  # seconds between two rewrites of the lease
EXPIRY_S = 30.0  # seconds without a rewrite after which the holder has lost the lease


@dataclass(frozen=True)
class Holder:
    """Identifies the process that holds a lease.

    started:         the process's start time as the system counts it: a process id may be used again
    beat:            grows with every heartbeat
    parent:          id of the process that restarts the holder when it dies; 0 = none
    parent_started:  the parent's start time, as `started`
    """

    run: str
    host: str
    pid: int
    started: str
    beat: int = 0
    parent: int = 0
    parent_started: str = ""

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host})"

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Return whether the process is alive, for a holder on this machine."""
        return is_alive(self.pid, self.started)

    @property
    def has_parent(self) -> bool:
        """Return whether the parent process is alive, for a holder on this machine."""
        return self.parent != 0 and is_alive(self.parent, self.parent_started)

    @classmethod
    def this_process(cls, run: str, *, is_watched: bool = False) -> "Holder":
        """Return this process as a holder.

        is_watched:  True where its parent restarts it when it dies
        """
        pid, parent = os.getpid(), os.getppid() if is_watched else 0
        return cls(
            run,
            socket.gethostname(),
            pid,
            start_time(pid),
            parent=parent,
            parent_started=start_time(parent) if parent else "",
        )


@contextmanager
def hold_lease(
    folder: OutputFolder,
    run: str,
    note: Callable[[str], None],
    heartbeat_s: float = HEARTBEAT_S,
    expiry_s: float = EXPIRY_S,
    *,
    is_watched: bool = False,
) -> Iterator[None]:
    """Hold the folder's lease in the context; it is taken over from another run if that is dead.

    note:         called with a message when it takes time to find out whether another holder is alive
    heartbeat_s:  seconds between rewrites of the lease
    expiry_s:     seconds without a rewrite after which another machine's holder has lost the lease
    is_watched:   see Holder.this_process

    Raises OutputError that names the living run that holds the lease, or why the folder cannot be read or written.
    """
    _wait_for(folder, note, expiry_s)
    this_process, done = Holder.this_process(run, is_watched=is_watched), Event()
    try:
        _write(folder, this_process)
    except OSError as error:
        raise OutputError(folder.explain(error)) from None
    thread = Thread(target=_send_heartbeats, args=(folder, this_process, done, heartbeat_s), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError, OutputError):  # the lease expires by itself
            holder = read_holder(folder)
            if holder is not None and holder.run == run:
                folder.remove(LEASE)


def _wait_for(folder: OutputFolder, note: Callable[[str], None], expiry_s: float) -> None:
    """Wait until nobody holds the lease. Raises OutputError where its holder is alive."""
    first = holder = read_holder(folder)
    until = time.monotonic() + expiry_s
    while holder is not None and time.monotonic() < until:
        if holder.is_on_this_host and not holder.is_alive:
            return
        if holder.is_on_this_host or holder != first:
            raise OutputError(
                f"{folder.path} is being written by {holder}. Wait for it, or stop it and go on from there."
            )
        if holder is first:
            note(f"{folder.path} was left by {holder}; waiting up to {expiry_s:.0f} s for a sign of life")
        time.sleep(min(1.0, expiry_s / 10))
        holder = read_holder(folder)


def _send_heartbeats(folder: OutputFolder, this_process: Holder, done: Event, heartbeat_s: float) -> None:
    beat = 0
    while not done.wait(heartbeat_s):
        beat += 1
        with suppress(OSError):  # the store is away for a moment; writes that matter fail elsewhere
            _write(folder, Holder(**asdict(this_process) | {"beat": beat}))


def _write(folder: OutputFolder, holder: Holder) -> None:
    folder.write(LEASE, json.dumps(asdict(holder)).encode(), durable=False)


def read_holder(folder: OutputFolder) -> Holder | None:
    """Return the holder of the folder's lease; None where there is no lease, or it cannot be parsed."""
    content = folder.read(LEASE)
    if content is None:
        return None
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
