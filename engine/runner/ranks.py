"""Ranks: the processes that hold the other parts of a model, and what rank 0, the engine, sends them.

A follower (follower.py) is a child process that makes the calls of ModelRunner which rank 0 makes. Calls travel over a
socket each; parts of activations travel through the backend's communicator. A follower ends with rank 0: its socket
closes, and Linux kills it with the thread that started it, which waits for its end, whatever it waits for itself. A
follower that ends, or that keeps a step waiting for longer than stall_s, ends the others and raises EngineError: the
engine cannot continue.
"""

import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from moray.engine.backends.base import Backend
from moray.engine.config import ModelConfig
from moray.engine.errors import DeviceError, EngineError
from moray.engine.partition import Partition
from moray.engine.platform.cpus import available_cores

STALL_S = 300.0  # a rank that others wait for longer has failed; the first step of a machine compiles kernels
LOOK_S = 0.05  # how often one looks whether a process that is waited for has ended
LENGTH_BYTES = 8  # in front of each message
READY = b"ready"
FOLLOWER = "from moray.engine.runner.follower import main; main()"


def send_message(connection: socket.socket, message: bytes) -> None:
    """Send a message: its length and its bytes."""
    connection.sendall(len(message).to_bytes(LENGTH_BYTES, "little") + message)


def receive_message(connection: socket.socket) -> bytes:
    """Wait for a message and return it; raise EOFError if the other end has closed."""
    length = int.from_bytes(_receive(connection, LENGTH_BYTES), "little")
    return bytes(_receive(connection, length))


def _receive(connection: socket.socket, length: int) -> bytearray:
    message = bytearray(length)
    view = memoryview(message)
    while view:
        if not (count := connection.recv_into(view)):
            raise EOFError
        view = view[count:]
    return message


class _Follower:
    """A process that runs a rank, and the end of its socket at rank 0. It refers to no Ranks, which owns it."""

    def __init__(self, partition: Partition, backend: Backend, memory: int, num_threads: int) -> None:
        self.rank = partition.rank
        self.connection, theirs = socket.socketpair()
        self._started: Future[subprocess.Popen[bytes]] = Future()
        place = partition.rank, partition.size, int(partition.expert_parallel)
        settings = theirs.fileno(), memory, *place, os.getpid(), num_threads
        # Linux kills the process when the thread that started it ends, so that thread waits for it.
        supervise = partial(_supervise, self._started, theirs, memory, [str(value) for value in settings])
        threading.Thread(target=supervise, name=f"rank {self.rank}", daemon=True).start()
        self.process = self._started.result()
        with contextlib.suppress(OSError):  # a process that has ended is found where it is waited for
            send_message(self.connection, pickle.dumps(backend))

    @property
    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        return self.process.returncode is not None

    def wait_for_message(self) -> bytes:
        """Wait for a message without a limit of time. Raises EOFError if the process ends."""
        while not select.select([self.connection], [], [], LOOK_S)[0]:
            if self.has_ended:
                raise EOFError
        return receive_message(self.connection)

    def last_words(self) -> str:
        """Return why the process has ended."""
        try:
            self.connection.settimeout(1)
            if (message := receive_message(self.connection)) != READY:
                return f"failed: {message.decode()}"
        except (OSError, EOFError):
            pass
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _supervise(
    started: "Future[subprocess.Popen[bytes]]", connection: socket.socket, memory: int, settings: list[str]
) -> None:
    """Start a follower and wait until it ends."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", FOLLOWER, *settings],
            stdin=subprocess.DEVNULL,
            pass_fds=(connection.fileno(), memory),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except BaseException as error:
        started.set_exception(error)
        return
    finally:
        connection.close()
    started.set_result(process)
    process.wait()


class Ranks:
    """The ranks of one or several engines, which step one after the other. With size 1 there is no other process.

    backend:  the device as rank 0 uses it
    expert_parallel:  see Partition
    stall_s:  seconds after which a rank that others wait for has failed
    """

    def __init__(
        self,
        size: int,
        backend: Backend,
        num_threads: int | None = None,
        *,
        expert_parallel: bool = False,
        stall_s: float = STALL_S,
    ) -> None:
        """Start the followers.

        num_threads: threads of all ranks together, which share them equally; None = one for each core

        Raises DeviceError where a model cannot be split among ranks, or not like this, on this device.
        """
        self.size, self.backend, self.stall_s = size, backend, stall_s
        self.expert_parallel = expert_parallel
        self._followers: list[_Follower] = []
        self._numbers = itertools.count()
        if size == 1:
            return
        if expert_parallel and not backend.has_whole_experts:
            raise DeviceError(
                f"{backend.name} cannot run whole experts on a rank yet. Set engine.expert_parallel to false."
            )
        self.num_threads = max(1, (num_threads or available_cores()) // size)
        self._finalizer = weakref.finalize(self, _end, self._followers)
        memory = os.memfd_create("moray-ranks")
        try:
            backend.prepare_ranks(size, memory)
            for rank in range(1, size):
                partition = Partition(rank, size, expert_parallel)
                self._followers.append(_Follower(partition, backend, memory, self.num_threads))
            reference = weakref.ref(self)  # the communicator belongs to self.backend

            def on_wait(seconds: float, rank: int | None) -> None:
                if (ranks := reference()) is not None:
                    ranks._check(seconds, rank)

            self.backend = backend.join_ranks(Partition(0, size, expert_parallel), memory, on_wait)
        finally:
            os.close(memory)

    @property
    def pids(self) -> list[int]:
        """The processes of ranks 1, 2, ..."""
        return [follower.process.pid for follower in self._followers]

    def open(
        self,
        load: Callable[..., Any],
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        block_size: int,
        *,
        wait_for_memory: bool,
    ) -> "RankedModel":
        """Let the followers load their parts of a model; they do so while rank 0 loads its own.

        wait_for_memory: first wait until the memory of each rank's device is free
        """
        model = RankedModel(self, next(self._numbers))
        model.send("load", load, folder, config, dtype, block_size, wait_for_memory)
        return model

    def close(self) -> None:
        """End the followers, whatever they do."""
        if self.size > 1:
            self._finalizer()

    def send(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        """Send a call of a model to all followers. Raises EngineError if one does not take it."""
        if not self._followers:
            return
        message = pickle.dumps((number, name, arguments))
        for follower in self._followers:
            follower.connection.settimeout(self.stall_s)
            try:
                send_message(follower.connection, message)
            except TimeoutError:
                self._fail(follower, f"has taken no call for {self.stall_s:g} s")
            except OSError:
                self._fail(follower, follower.last_words())

    def wait_until_loaded(self) -> None:
        """Wait until all followers have loaded a model. Raises EngineError if one cannot."""
        for follower in self._followers:
            try:
                message = follower.wait_for_message()
            except (EOFError, OSError):
                self._fail(follower, follower.last_words())
            if message != READY:
                self._fail(follower, f"failed: {message.decode()}")

    def _check(self, seconds: float, rank: int | None) -> None:
        """Raise EngineError if a follower has ended, or if the rank that is waited for is too late; None = any rank."""
        for follower in self._followers:
            if follower.has_ended:
                self._fail(follower, follower.last_words())
        late = [follower for follower in self._followers if rank in (None, follower.rank)]
        if late and seconds > self.stall_s:
            self._fail(late[0] if len(late) == 1 else None, f"has kept a step waiting for {self.stall_s:g} s")

    def _fail(self, follower: _Follower | None, what: str) -> NoReturn:
        """End all ranks and raise EngineError about a follower; None = about one of them, it is not known which."""
        self.close()
        if follower is None:
            name = f"one of the ranks 1 to {self.size - 1} (processes {', '.join(map(str, self.pids))})"
        else:
            name = f"rank {follower.rank} of {self.size} (process {follower.process.pid})"
        raise EngineError(f"{name} {what}; the engine has ended.")


def _end(followers: list[_Follower]) -> None:
    for follower in followers:
        follower.connection.close()
        follower.process.kill()  # also one that is stopped


class RankedModel:
    """A model whose parts are on the ranks: sends the calls that rank 0 makes to the others."""

    def __init__(self, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number
        weakref.finalize(self, _drop, ranks, number)

    def send(self, name: str, *arguments: Any) -> None:
        """Let all other ranks make the same call of ModelRunner. Raises EngineError if one cannot."""
        self._ranks.send(self._number, name, arguments)

    def wait_until_loaded(self) -> None:
        """Wait until all other ranks have loaded their parts."""
        self._ranks.wait_until_loaded()


def _drop(ranks: Ranks, number: int) -> None:
    """Let the followers forget a model, unless they have ended."""
    if ranks.size > 1 and ranks._finalizer.alive:
        with contextlib.suppress(EngineError):
            ranks.send(number, "drop", ())
