"""`moray serve`: Ray, Ray Serve and the endpoint on this machine, from start to end."""

import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_address
from threading import Event
from typing import Any

import yaml
from pydantic import ValidationError

from batch.planning.model_facts import read_config, read_facts
from batch.ray_session import ray_session
from batch.signals import catch_signals
from engine.errors import JobError, UserError
from engine.remote import ModelFolder
from serve.args import EndpointArgs
from serve.keys import ENVIRONMENT, Keys

NAME = "moray"
LOOK_EVERY_S = 0.1


def read_args(model: str, dtype: str, overrides: Sequence[str]) -> EndpointArgs:
    """Raises UserError with every mistake."""
    values: dict[str, object] = {"model": model, "dtype": dtype}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set must be KEY=VALUE, is {override!r}")
        values[key] = yaml.safe_load(text)
    try:
        return EndpointArgs.model_validate(values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise UserError("\n".join(problems)) from None


def run_endpoint(args: EndpointArgs, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; then take nothing new, finish what runs, and return. A second signal ends at once.

    Raises UserError for what is wrong with the model, the keys or the port, before Ray is started.
    """
    until = _Until()
    with catch_signals(until.signalled):
        model = ModelFolder(args.model)
        read_facts(model, read_config(model), args.dtype)
        who = _check_keys(args, host)
        _check_port(host, port)
        print(f"Loading {args.model}", flush=True)
        if not until.wait(0):
            with ray_session(None, tell=until.report):
                if _start(args, host, port, until):
                    print(f"{args.model_name} is served at http://{host}:{port} ({who}). Ctrl-C stops it.", flush=True)
                    until.wait()
                    print("Finishing what runs; a second signal ends at once", flush=True)
                    return _stop()
        print("Stopped before it was served", flush=True)


def _start(args: EndpointArgs, host: str, port: int, until: "_Until") -> bool:
    """Whether it serves: not where it was to end meanwhile. Raises JobError. What it started ends with Ray."""
    import ray
    from ray import serve as ray_serve

    from serve.app import build_at

    cluster: Any = ray
    serve: Any = ray_serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if args.num_gpus == 0 and args.device != "cpu" and cluster.cluster_resources().get("GPU", 0) >= 1:
        args = args.model_copy(update={"num_gpus": 1})
    # One replica listens itself: a proxy before it would add to every token, and choose among one.
    has_proxy = args.max_replicas > 1
    if until.wait(0):
        return False
    serve.start(proxy_location="HeadOnly" if has_proxy else "Disabled", http_options={"host": host, "port": port})
    application = serve.RunTarget(build_at(None if has_proxy else (host, port), args), NAME, "/")
    serve.run_many([application], wait_for_applications_running=False)
    while not until.wait(LOOK_EVERY_S):
        found = serve.status().applications[NAME]
        if found.status == "RUNNING":
            return True
        if found.status == "DEPLOY_FAILED":  # told with the text of the replica's traceback
            told = "\n".join([found.message, *(deployment.message for deployment in found.deployments.values())])
            raise JobError(f"the endpoint did not start: {_reason(told)}")
    return False


def _stop() -> None:
    from ray import serve as ray_serve

    serve: Any = ray_serve
    serve.delete(NAME, _blocking=False)  # which would wait for a minute at most
    while NAME in serve.status().applications:
        time.sleep(LOOK_EVERY_S)
    serve.shutdown()


class _Until:
    """The first signal ends the start, or what is served, in good order; a second one the process."""

    def __init__(self) -> None:
        self._ended = Event()

    def report(self, text: str) -> None:
        """What Ray's daemons say; at the end they only say that they end."""
        if not self._ended.is_set():
            print(text, flush=True)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is to end."""
        return self._ended.wait(seconds)

    def signalled(self, name: str) -> None:
        if self._ended.is_set():
            sys.exit(128 + signal.Signals[name])
        self._ended.set()


def _check_keys(args: EndpointArgs, host: str) -> str:
    """Whom the endpoint will serve, in words. Raises UserError where it would be open to a network unasked."""
    try:
        has_keys = Keys(args.keys_file).are_configured
    except OSError as error:
        raise UserError(f"keys_file: {error}") from None
    if has_keys:
        return "to who has a key"
    if args.is_public:
        return "to everybody: no keys are configured"
    if host == "localhost" or _is_loopback(host):
        return "to this machine only: no keys are configured, Authorization headers are ignored"
    raise UserError(
        f"host is {host} and no keys are configured, so anybody could use the endpoint. Set keys_file or "
        f"{ENVIRONMENT}, or is_public=true if that is meant, or listen on 127.0.0.1."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host.") from None


def _reason(text: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line and not line.startswith(" ")]
    return lines[-1] if lines else text
