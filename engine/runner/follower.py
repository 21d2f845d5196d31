"""A follower: the process of a rank other than 0. It makes the calls of ModelRunner that rank 0 sends, in order."""

import contextlib
import ctypes
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from typing import Any

import torch

from moray.engine.backends.base import Backend
from moray.engine.backends.communicator import GatherCancelled
from moray.engine.partition import Partition
from moray.engine.runner.model_runner import ModelRunner
from moray.engine.runner.ranks import READY, receive_message, send_message

PR_SET_PDEATHSIG = 1
SPINS = 200  # looks for the next call before the process sleeps: it comes soon while rank 0 steps


def main() -> None:
    """Serve rank 0 until it closes the socket. The arguments are those that Ranks gives."""
    fd, memory, rank, size, expert_parallel, parent, num_threads = map(int, sys.argv[1:])
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; rank 0 decides
    torch.set_num_threads(num_threads)

    def check_parent(seconds: float, late: int | None) -> None:
        if os.getppid() != parent:
            os._exit(1)

    code = 0
    with socket.socket(fileno=fd) as connection:
        try:
            backend: Backend = pickle.loads(receive_message(connection))
            backend = backend.join_ranks(Partition(rank, size, bool(expert_parallel)), memory, check_parent)
            os.close(memory)
            _serve(connection, backend)
        except EOFError:
            pass  # rank 0 has closed the socket, or has ended
        except BaseException:
            code = 1
            traceback.print_exc()
            with contextlib.suppress(OSError):
                send_message(connection, traceback.format_exc().encode())
    sys.stderr.flush()
    os._exit(code)  # at once: a device may wait for ranks that come no more


def _end_with(parent: int) -> None:
    """Let Linux kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has ended before


def _serve(connection: socket.socket, backend: Backend) -> None:
    models: dict[int, ModelRunner] = {}
    while True:
        _spin(connection)
        number, name, arguments = pickle.loads(receive_message(connection))
        try:
            if name == "load":
                models[number] = _load(backend, *arguments)
                send_message(connection, READY)
            elif name == "drop":
                models.pop(number, None)
            else:
                getattr(models[number], name)(*arguments)
        except GatherCancelled:
            pass  # nothing of an interrupted step counts


def _spin(connection: socket.socket) -> None:
    """Look for the next call for a while: a process that sleeps is woken later."""
    for _ in range(SPINS):
        if select.select([connection], [], [], 0)[0]:
            return


def _load(
    backend: Backend,
    load: Any,
    folder: Any,
    config: Any,
    dtype: torch.dtype,
    block_size: int,
    wait_for_memory: bool,
) -> ModelRunner:
    if wait_for_memory:
        backend.wait_for_memory()
    model = load(folder, config, dtype, backend)
    return ModelRunner(model, config, dtype, block_size=block_size, backend=backend)
