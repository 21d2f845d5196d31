"""ServeApplication: the endpoint in Ray Serve, on a Ray of its own or next to other applications of a cluster."""

import logging
import time
from secrets import token_hex
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moray.batch.plan.nodes import Placement, explain_unschedulable
from moray.batch.runtime.cluster_nodes import cluster_nodes, has_process
from moray.batch.runtime.ray_internals import has_serve, list_replicas
from moray.engine.errors import JobError
from moray.jobs.app import build_at
from moray.serve.app import NAME as DEPLOYMENT
from moray.serve.args import EndpointArgs

NAME = "moray"
POLL_S = 0.1  # between two looks at whether the application is gone

serve: Any = ray_serve


class ServeApplication:
    """Starts and stops the endpoint as an application of Serve.

    On a cluster it leaves other applications alone: it starts no proxies, whose ports others may need, and takes no
    route of those that run.

    owns_ray:  Ray, and Serve with it, runs for this application alone
    """

    def __init__(self, *, owns_ray: bool) -> None:
        self._owns_ray = owns_ray
        self._owns_serve = owns_ray or not has_serve()
        self._name = NAME if owns_ray else f"{NAME}-{token_hex(4)}"
        self._placement = Placement(0.0)
        self._node: str | None = None  # id of the node that has to run the one replica; None = any node
        self._has_proxy = False  # clients connect to Serve's proxy, not to the replica

    def start(self, args: EndpointArgs, host: str, port: int) -> None:
        """Ask Serve to start the application, and return before it is up.

        Raises JobError where Serve does not start.
        """
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        node = ray.get_runtime_context().get_node_id()
        if args.num_gpus == 0 and args.device != "cpu" and _num_gpus(node) >= 1:
            args = args.model_copy(update={"num_gpus": args.num_ranks})
        # A single replica listens itself: a proxy would delay every token, and has nothing to balance.
        self._has_proxy = args.max_replicas > 1
        if self._owns_serve:
            where = "HeadOnly" if self._has_proxy else "Disabled"
            try:
                serve.start(proxy_location=where, http_options={"host": host, "port": port})
            except (RayError, RayServeException, TimeoutError) as error:
                # It waits for its proxy for a minute, which is always enough but on a machine that others keep busy.
                raise JobError(f"Ray Serve did not start: {_reason(str(error))}; try again") from error
        target = build_at(None, args) if self._has_proxy else build_at((host, port), args, node)
        self._placement = Placement(args.num_cpus, args.num_gpus)
        self._node = None if self._has_proxy else node
        # Without a route prefix it conflicts with no other application's.
        application = serve.RunTarget(target, self._name, "/" if self._owns_ray else None)
        serve.run_many([application], wait_for_applications_running=False)

    def explain_wait(self) -> str | None:
        """Return what the endpoint waits for: a place for its first replica, or Serve's proxy; None for all else."""
        if has_process(list_replicas(self._name, DEPLOYMENT)):
            if self._has_proxy and not _is_proxy_up(serve.status()):
                return "Waiting for Ray Serve's proxy, to which clients of several replicas connect, to start"
            return None
        reason = explain_unschedulable(self._placement, cluster_nodes(self._node), is_own=self._owns_ray)
        return f"Waiting for Ray to schedule the endpoint, which asks for {self._placement}: {reason}"

    def is_running(self) -> bool:
        """Return whether the application serves. Raises JobError where it cannot start."""
        status = serve.status()
        found = status.applications[self._name]
        if found.status == "DEPLOY_FAILED":  # the messages hold the replica's traceback
            messages = "\n".join([found.message, *(deployment.message for deployment in found.deployments.values())])
            reason = _reason(messages)
            if "ActorUnschedulableError" in messages:  # that error does not name the resource
                reason = explain_unschedulable(self._placement, cluster_nodes(self._node))
            raise JobError(f"the endpoint did not start: {reason}")
        return bool(found.status == "RUNNING") and (not self._has_proxy or _is_proxy_up(status))

    def stop(self, *, waits: bool = True) -> None:
        """Delete the application, which finishes its requests, and shut Serve down where nobody else uses it.

        waits:  return after the application is gone; False = at once, and leave Serve running
        """
        if not has_serve():  # the application was not started
            return
        serve.delete(self._name, _blocking=False)  # blocking, it would wait for a minute at most
        while waits and self._name in serve.status().applications:
            time.sleep(POLL_S)
        if waits and self._owns_serve and (self._owns_ray or not serve.status().applications):
            serve.shutdown()


def _is_proxy_up(status: Any) -> bool:
    return bool(status.proxies) and all(one == "HEALTHY" for one in status.proxies.values())


def _num_gpus(node: str) -> float:
    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return float(next(one["Resources"].get("GPU", 0) for one in nodes if one["NodeID"] == node))


def _reason(text: str) -> str:
    """Return the line of a traceback that names the error, or all of the text where there is none."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line and not line.startswith(" ")]
    return lines[-1] if lines else text
