"""/metrics: Prometheus text. The engine's totals have the names of engine/metrics.py."""

from collections.abc import Iterable
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.async_engine import AsyncEngine, Load

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {
    "seqs": "samples in the engine",
    "waiting_seqs": "samples that wait for a place in a step",
    "queued_tokens": "tokens still to compute or to generate, at most",
    "free_blocks": "blocks of the KV cache that can be had",
    "blocks": "blocks of the KV cache",
}
assert GAUGES.keys() == Load.__dataclass_fields__.keys()


class EndpointMetrics:
    """What one replica counts, beside its engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine))
        self.requests = Counter("moray_requests", "requests", ["path", "status"], registry=self._registry)
        self.first_token = Histogram(
            "moray_first_token_seconds",
            "from a request's arrival to its first token",
            registry=self._registry,
            buckets=SECONDS,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, total in asdict(self._engine.metrics).items():
            yield CounterMetricFamily(f"moray_{name}", "see engine/metrics.py", value=total)
        for name, now in asdict(self._engine.load).items():
            yield GaugeMetricFamily(f"moray_{name}", GAUGES[name], value=now)
