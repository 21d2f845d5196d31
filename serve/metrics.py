"""EndpointMetrics: the Prometheus text of /metrics. The engine's totals have the names of engine/metrics.py."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moray.engine.async_engine import AsyncEngine
from moray.engine.metrics import COUNTED, prometheus_name

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES: dict[str, tuple[str, Callable[[AsyncEngine], int]]] = {
    "seqs": ("Samples in the engine.", lambda engine: engine.num_seqs),
    "waiting_seqs": (
        "Samples in the engine that the scheduler has not admitted yet.",
        lambda engine: engine.stats().waiting_seqs,
    ),
    "queued_tokens": (
        "Upper bound of the tokens still to compute or to generate.",
        lambda engine: engine.queued_tokens,
    ),
    "free_blocks": (
        "Blocks of the KV cache that can be allocated; they may hold cached prefixes.",
        lambda engine: engine.stats().free_blocks,
    ),
    "blocks": ("Blocks of the KV cache.", lambda engine: engine.stats().blocks),
    "max_num_seqs": ("Most sequences in a step.", lambda engine: engine.stats().max_num_seqs),
    "max_num_batched_tokens": ("Most tokens in a step.", lambda engine: engine.stats().max_num_batched_tokens),
}


class EndpointMetrics:
    """Holds the metrics of one replica: its requests, and its engine's totals and gauges at the time of a scrape."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine))
        self.requests = Counter(
            "moray_requests",
            "HTTP requests by path and status of the answer.",
            ["path", "status"],
            registry=self._registry,
        )
        self.batch_requests = Counter(
            "moray_batch_requests",
            "Lines of batches that this replica answered, by path and status of the answer.",
            ["path", "status"],
            registry=self._registry,
        )
        self._batches = Gauge(
            "moray_batches", "Batches that are not over, by state.", ["state"], registry=self._registry
        )
        self._pending = Gauge(
            "moray_batch_requests_pending", "Requests of these batches that are not done.", registry=self._registry
        )
        self.first_token = Histogram(
            "moray_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            registry=self._registry,
            buckets=BUCKETS_S,
        )

    def text(self, open_batches: Mapping[str, int]) -> bytes:
        """Return all metrics in Prometheus' text format.

        open_batches:  number of batches by state, and of their `requests` that are not done; the same at each replica
        """
        for state, number in open_batches.items():
            if state == "requests":
                self._pending.set(number)
            else:
                self._batches.labels(state).set(number)
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, total in asdict(self._engine.stats().totals).items():
            yield CounterMetricFamily(prometheus_name(name), COUNTED[name], value=total)
        for name, (text, read) in GAUGES.items():
            yield GaugeMetricFamily(prometheus_name(name), text, value=read(self._engine))
