"""Ports for servers that tests start."""

import random
import socket
from pathlib import Path


def free_port() -> int:
    """Return a port that nothing listens on, and that the system gives to no connection before it is bound."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, first_ephemeral)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
