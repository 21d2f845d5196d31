"""A connection to Ray: a local one that ends with the job, or a cluster's. Ray reads its environment when it is
imported, so nothing imports it before this does."""

import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import UserError

CONNECT_S = 10.0


def check_address(address: str) -> None:
    """Raises UserError unless something answers there. Ray itself would try for minutes, and name no reason.

    address:  HOST:PORT or ray://HOST:PORT; auto and local, which Ray looks up here, are let pass
    """
    if address in ("auto", "local"):
        return
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        dashboard = "; a dashboard's is for moray submit" if scheme.startswith("http") else ""
        raise UserError(
            "--address must be HOST:PORT of a Ray cluster's head (the port is 6379 as a rule), ray://HOST:PORT, or "
            f"auto on one of its nodes, is {address!r}{dashboard}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # of a name that can be none
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at --address {address} (tried for up to {CONNECT_S:.0f} s: "
            f"{reason}). It must be HOST:PORT of the head (the port is 6379 as a rule), reachable "
            "from here, or auto on one of the cluster's nodes."
        ) from None


@contextmanager
def ray_session(
    address: str | None, tell: Callable[[str], None], keeps_logs: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Be connected to Ray; where the process is already, that connection is used and left alone.

    address:     a cluster's; None starts Ray on this machine
    tell:        called, in another thread, with what Ray's daemons report (a process that was killed, and why)
    keeps_logs:  asked at the end, whether the folder of a Ray that was started here is to stay
    """
    if "ray" not in sys.modules:
        _set_environment(is_local=address is None)
    with _muted_stderr():  # where it says that it was told to be quiet
        import ray

        if ray.is_initialized():
            connected = False
        else:
            connected = True
            _redirect_reports(tell)
            _keep_signals()
            ray.init(
                address=address,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    try:
        yield
    finally:
        if connected:
            context = ray.get_runtime_context()
            folder = Path(context.get_temp_dir(), context.get_session_name())
            ray.shutdown()
            if address is None and not keeps_logs():
                shutil.rmtree(folder, ignore_errors=True)


def _set_environment(*, is_local: bool) -> None:
    """Without a token, whoever reaches a local Ray's ports could run code here; a token of Ray's own making would stay
    in the home directory. Ray's C++ side writes to the driver's stderr what comes as an exception too."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if is_local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # nobody looks, and Ray keeps 100,000 of them
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Mute the file descriptor, which is what C++ writes to."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _redirect_reports(tell: Callable[[str], None]) -> None:
    """Ray prints its daemons' reports to stdout, whatever log_to_driver says, and has no switch for it."""
    from ray._private import worker

    def take(report: dict[str, Any], ignore_prefix: bool = False) -> None:
        tell("\n".join(report["lines"]))

    worker.print_to_stdstream = take  # type: ignore[assignment]


def _keep_signals() -> None:
    """ray.init puts a handler for SIGTERM in place of whatever is there, and has no switch for it."""
    from ray._private import utils

    utils.set_sigterm_handler = lambda handler: None
