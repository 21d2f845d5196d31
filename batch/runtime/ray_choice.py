"""The choice of the Ray that a command uses.

It is the cluster that --address or RAY_ADDRESS names, or else a local Ray of the command's own.
"""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moray.batch.runtime import ray_internals
from moray.batch.runtime.ray_clusters import check_token, find_clusters
from moray.engine.errors import UserError

CONNECT_S = 10.0  # seconds allowed for connecting to a cluster
REMOVAL_TIMEOUT_S = 15.0  # seconds allowed for removing the folder of a local Ray
OPTION, VARIABLE = "--address", "RAY_ADDRESS"
# An HTTP/2 connection, and so a gRPC one, begins with this; the server answers with a SETTINGS frame (type 4).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4
_EXPECTED = (
    "HOST:PORT of a Ray cluster's head (the port is 6379 as a rule), auto on one of the cluster's nodes, or local for "
    "a Ray of its own"
)
# The path of Ray's longest socket: <folder>/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store.
_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes of an AF_UNIX path
_PREFIX = "moray-"
TOKEN_BYTES = 8  # random bytes, written as twice as many hexadecimal digits
MAX_PARENT = _MAX_SOCKET_PATH - _SOCKET - len(f"/{_PREFIX}") - 2 * TOKEN_BYTES


@dataclass(frozen=True)
class RayChoice:
    """Describes the Ray that a command uses.

    address:  HOST:PORT of the cluster to join; None starts a Ray on this machine
    parent:   where a Ray that is started creates its folder
    remark:   what a person should know about the choice; empty where it is what they expect
    """

    address: str | None = None
    parent: Path = Path("/tmp")
    remark: str = ""


def choose_ray(option: str | None = None) -> RayChoice:
    """Decide which Ray to use, before anything is started or written.

    option:  the value of --address; where it is None or auto, RAY_ADDRESS decides, as in ray.init

    Raises UserError where no cluster answers at the address, where the cluster does not accept this machine's token, or
    where no folder can hold the files of a local Ray.
    """
    source, address = OPTION, option
    variable = os.environ.get(VARIABLE, "").strip()
    if variable and option in (None, "auto"):
        source, address = VARIABLE, variable
    if address is None or address == "local":
        return _choose_folder()
    if address == "auto":
        address = _find_cluster(source)
    check_address(address, source)
    check_token(address)
    remark = f"Using the Ray cluster at {address}, as {VARIABLE} says." if source == VARIABLE and not option else ""
    return RayChoice(address, remark=remark)


def prepare_environment(*, is_local: bool) -> None:
    """Set what Ray reads from the environment when it is imported; do nothing where it has been imported already.

    Without a token, whoever reaches a local Ray's ports could run code here; a token made by Ray would stay in the home
    directory.
    """
    if "ray" in sys.modules:
        return
    ray_internals.set_environment(is_local=is_local)
    if is_local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check_address(address: str, source: str = OPTION) -> None:
    """Raise UserError unless a Ray cluster answers at the address. Ray itself would try for minutes and name no reason.

    source:  the option or variable that gave the address
    """
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme in ("http", "https"):
        raise UserError(
            f"{source} is {address!r}, a dashboard's address: moray submit SPEC --address {address} runs a job there. "
            f"This command takes {_EXPECTED}."
        )
    if scheme == "ray":
        raise UserError(
            f"{source} is {address!r}: Ray Client cannot run Ray Data's jobs. Give {_EXPECTED}; from outside the "
            f"cluster moray submit SPEC --address http://{host or 'HEAD'}:8265 runs a job there."
        )
    if scheme or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{source} must be {_EXPECTED}, is {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
            is_grpc = _speaks_grpc(connection)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host is no valid name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at {source} {address} (tried for up to {CONNECT_S:.0f} s: {reason}). It must be "
            "HOST:PORT of the head (the port is 6379 as a rule), reachable from here, or auto on one of the cluster's "
            "nodes."
        ) from None
    if not is_grpc:
        raise UserError(
            f"what answers at {source} {address} is not the head of a Ray cluster, whose port is 6379 as a rule. For "
            f"a dashboard: moray submit SPEC --address http://{place}"
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Return whether gRPC answers; more cannot be known without the cluster's token or certificate."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True
    connection.sendall(_PREFACE)
    answer = connection.recv(9)
    return len(answer) > 3 and answer[3] == _SETTINGS


def _find_cluster(source: str) -> str:
    """Return the address of the cluster that runs on this machine, found by its processes.

    Of several clusters it is the one that `ray start` has started last. Ray's own search would also find the Ray of
    another job.
    """
    prepare_environment(is_local=False)
    running, last = find_clusters(), ray_internals.find_started_cluster()
    if len(running) == 1:
        return running[0]
    if last is not None:
        return last
    if running:
        raise UserError(
            f"{source} is auto, but several Ray clusters run on this machine: give one of {', '.join(running)}"
        )
    raise UserError(
        f"{source} is auto, but no Ray cluster runs on this machine. Start one with ray start, or give {_EXPECTED}."
    )


def _choose_folder() -> RayChoice:
    """Choose the first of $RAY_TMPDIR, $TMPDIR, /tmp and /var/tmp that can be written and has a short enough path.

    The names of Ray's sockets, which follow the path, must fit into the system's limit.
    """
    refused: list[str] = []
    for name, text in _parents():
        parent = Path(text).absolute()
        problem = _find_problem(parent)
        if problem:
            refused.append(f"{name} {parent} {problem}".strip())
            continue
        return RayChoice(parent=parent, remark=f"Ray's files go to {parent}: {'; '.join(refused)}." if refused else "")
    raise UserError(
        f"no folder can hold the files of Ray: {'; '.join(refused)}. Set RAY_TMPDIR to a folder that can be written, "
        f"with a path of at most {MAX_PARENT} bytes."
    )


def _find_problem(parent: Path) -> str:
    """Return why the folder cannot hold the files of a Ray; empty where it can."""
    size = len(os.fsencode(parent))
    if size > MAX_PARENT:
        path = size + _MAX_SOCKET_PATH - MAX_PARENT
        return (
            f"is {size} bytes long: with the names of Ray's sockets behind it that makes {path}, and the system takes "
            f"{_MAX_SOCKET_PATH}, which leaves {MAX_PARENT} for the folder"
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def make_folder(parent: Path, token: str | None = None) -> Path:
    """Create a folder for a local Ray. No other Ray looks into it, as they all do into /tmp/ray.

    token:  a name by which find_folders finds it; None makes a random one. It is random because containers and hosts
            that share the parent folder do not share process ids
    """
    folder = parent / f"{_PREFIX}{token or secrets.token_hex(TOKEN_BYTES)}"
    folder.mkdir(mode=0o700)
    return folder


def find_folders(token: str) -> list[Path]:
    """Return the folders that were made with the token and not removed."""
    folders = [Path(parent).absolute() / f"{_PREFIX}{token}" for _, parent in _parents()]
    return [folder for folder in folders if folder.exists()]


def _parents() -> list[tuple[str, str]]:
    """Return the folders that may hold such a folder, best first, each with the variable that names it."""
    named = [(name, os.environ[name]) for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    return [*named, ("", "/tmp"), ("", "/var/tmp")]


def remove_folder(folder: Path) -> None:
    """Remove a folder of make_folder.

    It tries again while the rest of its Ray still writes to the folder: workers outlive the raylet by seconds on a busy
    machine.
    """
    end_s = time.monotonic() + REMOVAL_TIMEOUT_S
    while folder.exists() and time.monotonic() < end_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05 if folder.exists() else 0.0)
