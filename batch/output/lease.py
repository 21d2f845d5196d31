"""Lease: who is writing to an output folder. Advisory: two runs at once do no harm, they only do the work twice.

The holder rewrites _job/lease.json every few seconds. One that is dead, or has not done so for half a minute, has lost
it. Clocks of machines differ: what counts is whether the file changes while we look.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Event, Thread

from batch.faults.process import is_alive, start_time
from batch.output.folder import JOB, OutputFolder
from engine.errors import OutputError

LEASE = f"{JOB}/lease.json"
BEAT_S = 5.0
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Holder:
    """
    started:  of the process, as the system counts: a process id may be used again
    beat:     grows with every heartbeat
    """

    run: str
    host: str
    pid: int
    started: str
    beat: int = 0

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host})"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """For one on this machine."""
        return is_alive(self.pid, self.started)

    @classmethod
    def me(cls, run: str) -> "Holder":
        return cls(run, socket.gethostname(), os.getpid(), start_time(os.getpid()))


@contextmanager
def hold_lease(
    folder: OutputFolder,
    run: str,
    note: Callable[[str], None],
    beat_s: float = BEAT_S,
    patience_s: float = PATIENCE_S,
) -> Iterator[None]:
    """Hold the folder's lease, from another run if that is dead.

    note:  told when it takes time to find out

    Raises OutputError naming the run that holds it and is alive, or why the folder cannot be read or written.
    """
    _wait_for(folder, note, patience_s)
    me, done = Holder.me(run), Event()
    try:
        _write(folder, me)
    except OSError as error:
        raise OutputError(folder.explain(error)) from None
    thread = Thread(target=_beat, args=(folder, me, done, beat_s), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError, OutputError):  # it lapses by itself
            holder = _read(folder)
            if holder is not None and holder.run == run:
                folder.remove(LEASE)


def _wait_for(folder: OutputFolder, note: Callable[[str], None], patience_s: float) -> None:
    """Return once nobody holds the lease."""
    first = holder = _read(folder)
    until = time.monotonic() + patience_s
    while holder is not None and time.monotonic() < until:
        if holder.is_here and not holder.is_alive:
            return
        if holder.is_here or holder != first:
            raise OutputError(
                f"{folder.path} is being written by {holder}. Wait for it, or stop it and go on from there."
            )
        if holder is first:
            note(f"{folder.path} was left by {holder}; waiting up to {patience_s:.0f} s for a sign of life")
        time.sleep(min(1.0, patience_s / 10))
        holder = _read(folder)


def _beat(folder: OutputFolder, me: Holder, done: Event, beat_s: float) -> None:
    beat = 0
    while not done.wait(beat_s):
        beat += 1
        with suppress(OSError):  # a store that is away for a moment; what matters fails elsewhere
            _write(folder, Holder(**asdict(me) | {"beat": beat}))


def _write(folder: OutputFolder, holder: Holder) -> None:
    folder.write(LEASE, json.dumps(asdict(holder)).encode(), durable=False)


def _read(folder: OutputFolder) -> Holder | None:
    """None where there is no lease, or nothing that could be one."""
    content = folder.read(LEASE)
    if content is None:
        return None
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
