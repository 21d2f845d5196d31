"""The Ray Serve application. A Serve config names it as `moray.jobs.app:build`; `moray serve` runs it too.

It has the Batch API where the arguments have a batch_store.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from moray.jobs.batches.deployment import Batches
from moray.jobs.batches.service import open_service
from moray.serve import app
from moray.serve.args import EndpointArgs


def build(args: EndpointArgs) -> Application:
    """Build the application for `serve run`, a Serve config or serve.run."""
    return build_at(None, args)


def build_at(address: tuple[str, int] | None, args: EndpointArgs, node: str | None = None) -> Application:
    """Build the application; the arguments are those of moray.serve.app.build_at."""
    if args.batch_store is None:
        return app.build_at(address, args, node)
    coordinator: Any = serve.deployment(Batches)
    # One, which has a place on every node that has one for a process: it does next to nothing.
    options = {
        "name": "batches",
        "num_replicas": 1,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 2.0,
        "ray_actor_options": {"num_cpus": 0, **app.node_option(node)},
    }
    return app.build_at(address, args, node, app.BatchParts(open_service, coordinator.options(**options).bind(args)))
