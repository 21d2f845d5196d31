"""The Ray Serve application without batches, which moray.jobs.app completes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from moray.engine.async_engine import AsyncEngine
from moray.engine.platform.cpus import available_cores
from moray.serve.api import create_app
from moray.serve.args import EndpointArgs
from moray.serve.batches import Answered, BatchService
from moray.serve.endpoint import BULK, Endpoint
from moray.serve.keys import Keys
from moray.serve.openai.line_answers import LineAnswerer, LineRequest
from moray.serve.replica_server import ReplicaServer

# Requests that Serve passes on to a replica at once: more than any has. AdmissionController bounds a replica, which
# answers 429: Serve's own limit must not apply before that.
MAX_ONGOING_REQUESTS = 100_000
NAME = "moray"  # of the deployment of replicas
BULK_WEIGHT = 0.25  # of a token of bulk beside another one, when replicas are counted: bulk may wait
METRICS_INTERVAL_S = 1.0  # how often Serve's autoscaler reads a replica's load
LOOK_BACK_S = 5.0  # over how long it averages the load


@dataclass(frozen=True)
class BatchParts:
    """Holds what an endpoint with the Batch API has beside its replicas.

    open_service:  makes the service of a replica
    coordinator:   the deployment that runs batches
    """

    open_service: Callable[[EndpointArgs], BatchService]
    coordinator: Application


@serve.ingress()
class Replica:
    """Runs one copy of the model and its endpoint. Serve drains it before it stops it: no new requests, then a wait
    for those that run.

    address:       host and port where the replica listens itself; None = Serve's proxies listen
    open_service:  see BatchParts; None = no Batch API
    coordinator:   handle of the deployment that runs batches: it is here for Serve to run that too
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        args: EndpointArgs,
        address: tuple[str, int] | None,
        open_service: Callable[[EndpointArgs], BatchService] | None = None,
        coordinator: Any = None,
    ) -> None:
        # Imported here: it brings torch, which the process that builds the application does not need.
        from moray.engine.engine import Engine

        keys = Keys(args.keys_file)
        config = args.engine_config(num_threads=available_cores())
        engine = await AsyncEngine.start(lambda: Engine(args.model, config))
        self._endpoint = Endpoint(args, engine)
        self._lines = LineAnswerer(self._endpoint)
        self._app = create_app(self._endpoint, keys, None if open_service is None else open_service(args))
        self._server = None if address is None else ReplicaServer.open(self._app, *address)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Raise the engine's failure, if there is one: Serve then replaces the replica."""
        failure = self._endpoint.engine.failure
        if failure is not None:
            raise failure

    def record_autoscaling_stats(self) -> dict[str, float]:
        tokens = self._endpoint.engine.queued_tokens_by_priority()
        weights = {BULK: BULK_WEIGHT}
        return {"queued_tokens": sum(weights.get(priority, 1.0) * number for priority, number in tokens.items())}

    async def answer_lines(self, lines: Sequence[LineRequest]) -> Answered:
        """Answer lines of batches, for the coordinator; see LineAnswerer."""
        return await self._lines.answer(lines)

    async def __del__(self) -> None:
        if not hasattr(self, "_server"):  # stopped while __init__ ran
            return
        if self._server is not None:
            await self._server.drain()
        self._endpoint.engine.close()


def node_option(node: str | None) -> dict[str, Any]:
    """Return the option of an actor that puts it on a node; None = Ray chooses."""
    return {} if node is None else {"label_selector": {"ray.io/node-id": node}}


def build_at(
    address: tuple[str, int] | None, args: EndpointArgs, node: str | None = None, batches: BatchParts | None = None
) -> Application:
    """Build the application.

    address:  host and port where its one replica listens itself, without Serve's proxies; None = with the proxies
    node:     id of the node that runs it; None = Ray chooses
    batches:  what the Batch API needs; None = it is not offered
    """
    options: dict[str, Any] = {
        "name": NAME,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": args.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 2.0,
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, **node_option(node)},
    }
    if args.min_replicas < args.max_replicas:
        policy = {
            "policy_function": "moray.serve.autoscaling:ByQueuedTokens",
            "policy_kwargs": {"tokens_per_replica": args.queued_tokens_per_replica},
        }
        options["autoscaling_config"] = {
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
            "policy": policy,
        }
    else:
        options["num_replicas"] = args.min_replicas
    deployment: Any = serve.deployment(Replica)
    application: Application = deployment.options(**options).bind(
        args,
        address,
        None if batches is None else batches.open_service,
        None if batches is None else batches.coordinator,
    )
    return application
