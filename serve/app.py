"""The Ray Serve application: `serve.app:build` in a Serve config, or moray serve."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from engine.async_engine import AsyncEngine
from engine.cores import available_cores
from serve.api import create_app
from serve.args import EndpointArgs
from serve.endpoint import Endpoint
from serve.keys import Keys
from serve.listener import Listener

# What bounds a replica is its own admission, which answers 429: Serve's is out of the way.
MAX_ONGOING_REQUESTS = 100_000
METRICS_INTERVAL_S, LOOK_BACK_S = 1.0, 5.0  # how often the load is looked at, and over what time it is averaged


@serve.ingress()
class Replica:
    """One copy of the model and its endpoint. Serve drains it: it takes no requests and waits for those that run.

    address: where it listens itself; None: Serve's proxies do
    """

    async def __init__(self, args: EndpointArgs, address: tuple[str, int] | None) -> None:  # type: ignore[misc]  # Serve awaits it
        from engine.engine import Engine  # and torch, which the process that builds the application has no use for

        keys = Keys(args.keys_file)
        config = args.engine_config(num_threads=available_cores())
        engine = await AsyncEngine.start(lambda: Engine(args.model, config))
        self._endpoint = Endpoint(args, engine)
        self._app = create_app(self._endpoint, keys)
        self._listener = None if address is None else Listener.open(self._app, *address)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        failure = self._endpoint.engine.failure
        if failure is not None:
            raise failure

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"queued_tokens": float(self._endpoint.engine.load.queued_tokens)}

    async def __del__(self) -> None:
        if not hasattr(self, "_listener"):  # stopped while it was made
            return
        if self._listener is not None:
            await self._listener.drain()
        self._endpoint.engine.close()


def build(args: EndpointArgs) -> Application:
    """An application for `serve run`, a Serve config or serve.run."""
    return build_at(None, args)


def build_at(address: tuple[str, int] | None, args: EndpointArgs) -> Application:
    """An application whose one replica listens at `address` itself, without Serve's proxies; None: with them."""
    options: dict[str, Any] = {
        "name": "moray",
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": args.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 2.0,
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
    }
    if args.min_replicas < args.max_replicas:
        policy = {
            "policy_function": "serve.autoscaling:ByQueuedTokens",
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
    application: Application = deployment.options(**options).bind(args, address)
    return application
