"""Read this machine's processes from /proc: their command lines, and which one listens on a port."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"  # the state of a listening socket in /proc/net/tcp


def commands() -> Iterator[tuple[int, list[str]]]:
    """Yield (process id, command line) of every process that this user may look at."""
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0]:  # empty for a kernel thread or a zombie
                yield int(folder.name), words


def is_free(port: int, host: str = "") -> bool:
    """Return whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def listener(port: int) -> str:
    """Return the process that listens on the port, `python3 (process 12)`; empty where this user cannot see it."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(folder / "fd" / name) in sockets for name in os.listdir(folder / "fd")):
                return f"{(folder / 'comm').read_text().strip()} (process {folder.name})"
    return ""


def _inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
