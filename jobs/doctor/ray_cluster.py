"""Check the Ray that a job would use: a local one, or a cluster. No check starts Ray."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from urllib.request import getproxies, proxy_bypass

from moray.batch.runtime.ray_choice import OPTION, VARIABLE, choose_ray, prepare_environment
from moray.batch.runtime.ray_clusters import TokenError, find_clusters
from moray.batch.runtime.ray_internals import read_cluster_metadata
from moray.engine.errors import UserError
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.processes import is_free, listener

TIMEOUT_S = 5.0  # for the answer of a head
# port -> (what listens there, what to do where it is in use)
PORTS = {
    8000: ("moray serve", "moray serve --port NUMBER"),
    6379: ("the head of ray start", "ray start --head --port=NUMBER"),
    8265: ("the dashboard of ray start", "ray start --head --dashboard-port=NUMBER"),
}
# Prefixes of variables that change how Ray Data splits and moves blocks, whether Ray kills a worker that uses too much
# memory, or what it injects into jobs.
CHANGING = ("RAY_DATA_", "RAY_memory_", "RAY_testing_", "RAY_JOB_CONFIG_", "RAY_RUNTIME_ENV_HOOK")
SECRET = ("TOKEN", "PASSWORD", "KEY", "SECRET")  # parts of names of variables whose values are not shown


def cluster(subject: Subject) -> Iterator[Finding]:
    """Report which Ray a job would use, and check that a cluster answers, gives access, and runs the same versions."""
    try:
        choice = choose_ray(subject.address)
    except UserError as error:
        own = f"unset {VARIABLE}, or leave {OPTION} out: a job then starts a Ray of its own"
        message, fix = (error.problem, error.fix) if isinstance(error, TokenError) else (str(error), own)
        yield problem(" ".join(message.split()), fix)
        return
    if choice.address is None:
        yield ok(f"none named: a job starts a Ray of its own, with its files in {choice.parent}")
    else:
        yield _versions(choice.address)


def _versions(address: str) -> Finding:
    """Compare the versions of the cluster's head with ours: Ray refuses a driver of another version."""
    prepare_environment(is_local=False)
    from ray.exceptions import AuthenticationError

    try:
        theirs = read_cluster_metadata(address, TIMEOUT_S)
    except AuthenticationError:
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to what the cluster was started with"
        return problem(f"{address} does not accept this machine's token", fix)
    except Exception as error:  # Ray raises many kinds
        reason = str(error).splitlines()[0]
        return problem(f"{address} is no Ray: {reason}", "name the head of a Ray cluster, HOST:6379")
    here = {"ray_version": metadata.version("ray"), "python_version": platform.python_version()}
    value = f"{address}: Ray {theirs['ray_version']}, Python {theirs['python_version']}"
    if any(theirs[key] != version for key, version in here.items()):
        ours = f"Ray {here['ray_version']}, Python {here['python_version']}"
        return problem(f"{value}; here {ours}", "run moray with the cluster's versions, or use moray submit")
    return ok(value)


def neighbours(_: Subject) -> Iterator[Finding]:
    """List the clusters that have a node on this machine. A job's local Ray does not interfere with them."""
    prepare_environment(is_local=False)
    found = find_clusters()
    yield ok(f"{len(found)} with a node here: {', '.join(found)}" if found else "none has a node on this machine")


def ports(_: Subject) -> Iterator[Finding]:
    """Check whether the default ports are free. A job's local Ray uses any free ports."""
    used = {port: listener(port) or "another user's process" for port in PORTS if not is_free(port)}
    ray_ports = [port for port in used if port != 8000]
    words = [f"{port} is used by {used[port]}" if port in used else f"{port} is free" for port in PORTS]
    if 8000 in used:
        yield warning(", ".join(words), f"for {PORTS[8000][0]}: {PORTS[8000][1]}")
    else:
        fixes = "; ".join(PORTS[port][1] for port in ray_ports)
        yield ok(", ".join(words) + (f" (a job needs none of them; for a cluster: {fixes})" if ray_ports else ""))


def variables(_: Subject) -> Iterator[Finding]:
    """List Ray's environment variables, and warn about those that change how it behaves."""
    names = sorted(name for name in os.environ if name.startswith("RAY_"))
    changing = [name for name in names if name.startswith(CHANGING)]
    value = ", ".join(name if any(word in name for word in SECRET) else f"{name}={os.environ[name]}" for name in names)
    if changing:
        yield warning(value, f"unset {' '.join(changing)}, unless you mean it: moray is tested without")
    else:
        yield ok(value or "none of Ray's is set")


def proxies(_: Subject) -> Iterator[Finding]:
    """Check that requests to this machine's own servers do not go to a proxy."""
    found = {name: address for name, address in getproxies().items() if name in ("http", "https", "all")}
    caught = [host for host in ("localhost", "127.0.0.1") if not proxy_bypass(host)]
    if not found:
        yield ok("none")
    elif caught:
        value = f"{', '.join(f'{name}_proxy' for name in found)} is set, and no_proxy lacks {', '.join(caught)}"
        fix = (
            "export no_proxy=localhost,127.0.0.1,HEAD_OF_THE_CLUSTER: clients of moray serve and of a dashboard need it"
        )
        yield warning(value, fix)
    else:
        yield ok(f"{', '.join(f'{name}_proxy' for name in found)}, not for this machine")
