"""Finds the Ray clusters on this machine, and checks whether a cluster accepts this machine's token.

Ray's own search treats every Ray as a cluster, and Ray notices that the tokens differ only when actors die of it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from moray.batch.runtime.ray_internals import CHECK_ALIVE, raylet_arguments
from moray.engine.errors import UserError

REQUEST_TIMEOUT_S = 5.0  # for the answer of a head
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# Where the local Ray of a job or an endpoint has its sockets: ray_choice.make_folder names the folder.
_PRIVATE = re.compile(r"/moray-[0-9a-f]{16}/session_")


class TokenError(UserError):
    """This machine's token and the cluster's are not the same.

    problem:  what differs
    fix:      what to do about it
    """

    def __init__(self, problem: str, fix: str) -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}; {fix}")

    def __reduce__(self) -> tuple[type["TokenError"], tuple[str, str]]:
        return type(self), (self.problem, self.fix)


def find_clusters() -> list[str]:
    """Return the heads, HOST:PORT, of the clusters that have a node on this machine.

    The local Rays of moray's jobs and endpoints are left out: they end with their job or endpoint.
    """
    found = {
        address for arguments in raylet_arguments() for address in _addresses(arguments) if not _is_private(arguments)
    }
    return sorted(found)


def _is_private(arguments: list[str]) -> bool:
    return any(word.startswith("--raylet_socket_name=") and _PRIVATE.search(word) for word in arguments)


def _addresses(arguments: list[str]) -> Iterator[str]:
    return (word.partition("=")[2] for word in arguments if re.match(r"--gcs-address=.+", word))


def check_token(address: str) -> None:
    """Raise TokenError where a driver here and the cluster at the address could not work together.

    A driver with a token can join a cluster without one. But then the driver refuses the cluster's workers, which have
    no token, and all that a person sees is that actors died.
    """
    mode = os.environ.get(MODE, "").lower()
    if mode not in ("", "disabled", "token") or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    wants_token = _is_refused(address, None)
    if wants_token is None:
        return
    if mode != "token":
        if wants_token:
            raise TokenError(
                f"the Ray cluster at {address} asks for a token, and {MODE} is not token here",
                f"set {MODE}=token, and {TOKEN} or {TOKEN_PATH} to what the cluster was started with",
            )
        return
    if not wants_token:
        raise TokenError(
            f"{MODE} is token here, and the Ray cluster at {address} was started without a token: its workers could "
            "not answer to this machine",
            f"set {MODE}=disabled here, or start the cluster with {MODE}=token and the token that is set here",
        )
    token = _own_token()
    if token is None:
        raise TokenError(
            f"{MODE} is token here, and there is no token",
            f"set {TOKEN} or {TOKEN_PATH} to what the Ray cluster at {address} was started with",
        )
    if _is_refused(address, token):
        raise TokenError(
            f"the Ray cluster at {address} does not take this machine's token",
            f"set {TOKEN} or {TOKEN_PATH} to what the cluster was started with",
        )


def _own_token() -> str | None:
    """Return the token that Ray would use here, from the first place where Ray looks that has one."""
    if token := os.environ.get(TOKEN, "").strip():
        return token
    path = Path(os.environ.get(TOKEN_PATH) or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeError):
        return None


def _is_refused(address: str, token: str | None) -> bool | None:
    """Send the head a request that changes nothing and return whether it refuses the token.

    Returns None where it gives no answer.
    """
    import grpc  # a dependency of Ray Serve

    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    options = (("grpc.enable_http_proxy", 0),)  # as in Ray
    with grpc.insecure_channel(address, options) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=REQUEST_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()
            return True if code is grpc.StatusCode.UNAUTHENTICATED else None
    return False
