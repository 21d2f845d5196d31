"""All that moray uses of Ray and that is not public, in one place: any version of Ray may move any of it.

It was read in Ray READ_IN. tests/batch/runtime/test_ray_internals.py tests each function against the installed Ray. Ray
is imported only where a function is called, because it reads its environment when it is imported: see ray_session.
"""

import atexit
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

READ_IN = "2.60"
# A gRPC method of the head that reads and changes nothing when it is asked about no nodes.
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # C++ writes to stderr what is also raised as an exception
    "RAY_ENABLE_AUTO_CONNECT": "0",  # otherwise a thread that calls Ray after its shutdown starts another Ray
}
_LOCAL = {
    "RAY_task_events_report_interval_ms": "0",  # nobody reads the events, and Ray keeps 100,000 of them
    # Serve kills a proxy that is not up by then, and on a busy machine that is true of every one. It gives up after 60.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def set_environment(*, is_local: bool) -> None:
    """Set the variables that Ray reads when it is imported, as far as they are not set."""
    for name, value in (_QUIET | _LOCAL if is_local else _QUIET).items():
        os.environ.setdefault(name, value)


# Clusters


def find_started_cluster() -> str | None:
    """Return the address, HOST:PORT, of the cluster that `ray start` has started last on this machine."""
    from ray._private import services

    address = services.find_bootstrap_address(None)
    return None if address is None else str(address)


def raylet_arguments() -> Iterator[list[str]]:
    """Yield the command line of each raylet on this machine that this user may inspect."""
    from ray._private import services

    psutil: Any = services.psutil  # type: ignore[attr-defined]
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"]
        if arguments and os.path.basename(arguments[0]) == "raylet":
            yield arguments


def read_cluster_metadata(address: str, timeout_s: float) -> dict[str, Any]:
    """Return what a head says about its cluster, such as `ray_version` and `python_version`, without joining it.

    Raises ray.exceptions.AuthenticationError where it does not accept this machine's token, and many other exceptions
    where it does not answer.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = GcsClient(address=address)
    metadata: dict[str, Any] = json.loads(
        client.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=timeout_s)
    )
    return metadata


def gcs_address() -> str:
    """Return HOST:PORT of the GCS of the cluster that this process has joined; empty where that is not known."""
    from ray._private import worker

    node: Any = worker._global_node  # None for a Ray client
    return "" if node is None else str(node.gcs_address)


def list_actors() -> list[Mapping[str, Any]]:
    """Return all actors of the cluster, also those that have ended, with `Name` and `Pid` among their keys."""
    from ray._private import state

    actors: dict[str, Mapping[str, Any]] = state.actors()
    return list(actors.values())


# The start and the end of a Ray


@contextmanager
def watched_starts(on_start: Callable[[str, int], object]) -> Iterator[None]:
    """Call `on_start` with Ray's name and the id of each process that ray.init starts, as soon as it is started."""
    from ray._private import services

    start = services.start_ray_process

    def start_and_report(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        started = start(command, process_type, *args, **options)
        on_start(process_type, started.process.pid)
        return started

    services.start_ray_process = start_and_report
    try:
        yield
    finally:
        services.start_ray_process = start


@contextmanager
def own_process_groups() -> Iterator[None]:
    """Give each process that ray.init starts a process group of its own; it has no option for that.

    A signal to the group of this process, such as `timeout` and a terminal send, then reaches this process alone, which
    ends Ray in good order. The GCS would end at once, and with it every call that this process still makes.
    """
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


@contextmanager
def without_idle_daemons() -> Iterator[None]:
    """Stop ray.init from starting daemons that have nothing to do for a local Ray; it has no option for that.

    They are the autoscaler of a cluster that cannot grow, the dashboard's process without a dashboard, and the reader
    of logs that nobody asks for: three Python processes, nearly half of the CPU time that a start of Ray takes.
    """
    from ray._private.node import Node

    replaced = {name: getattr(Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in replaced:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(Node, name, function)


def keep_sigterm_handler() -> None:
    """Stop Ray's Python side from replacing the process's handler of SIGTERM."""
    from ray._private import utils

    utils.set_sigterm_handler = lambda handler: None


def redirect_reports(on_report: Callable[[str], None]) -> None:
    """Pass the reports of Ray's daemons to `on_report`.

    Ray prints them to stdout, even with log_to_driver=False, and has no option for it.
    """
    from ray._private import worker

    def forward_report(report: dict[str, Any], ignore_prefix: bool = False) -> None:
        on_report("\n".join(report["lines"]))

    worker.print_to_stdstream = forward_report  # type: ignore[assignment]


def skip_shutdown_at_exit() -> None:
    """Stop Ray from shutting down when Python ends: it would wait for processes that are gone."""
    from ray._private import worker

    atexit.unregister(worker.shutdown)


def kill_at_shutdown(kill: Callable[[], None]) -> None:
    """Have ray.shutdown call `kill` once it has disconnected, before it asks each of its processes to end and waits."""
    from ray._private import worker

    node: Any = worker._global_node
    end = node.kill_all_processes

    def kill_all_processes(*args: Any, **options: Any) -> None:
        kill()
        end(*args, **options)

    node.kill_all_processes = kill_all_processes


# Ray Data


def map_blocks(dataset: Any, actor_class: type, config: object, **options: Any) -> Any:
    """Return the dataset mapped by actors, which are made from `config` and get one whole block a call, as Arrow.

    Dataset.map_batches only calls map_batches_internal, after it has asked for a batch size wherever GPUs are used.

    options:  as for Dataset.map_batches
    """
    return dataset.map_batches_internal(
        actor_class, fn_constructor_args=(config,), batch_size=None, batch_format="pyarrow", **options
    )


def iter_blocks(dataset: Any) -> "Iterator[pa.Table]":
    """Run the dataset and yield its blocks. Dataset.iter_rows also prefetches: a fifth of the driver's time."""
    import ray

    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


def silence_data_logs() -> None:
    """Keep Ray Data's log lines off the terminal; its log files have them too."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.CRITICAL + 1)


# Ray Serve


def has_serve() -> bool:
    """Return whether Serve runs on the Ray that this process has joined."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def list_replicas(application: str, deployment: str | None = None) -> list[Mapping[str, Any]]:
    """Return the actors of an application's replicas, also those that have ended; see list_actors.

    deployment:  of whose replicas; None = of all deployments
    """
    from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX

    prefix = f"{REPLICA_ID_FULL_ID_STR_PREFIX}{application}#" + ("" if deployment is None else f"{deployment}#")
    return [actor for actor in list_actors() if str(actor["Name"]).startswith(prefix)]
