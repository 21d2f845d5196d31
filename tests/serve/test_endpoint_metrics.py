"""What /metrics says, by the conventions of Prometheus."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from moray.engine.metrics import COUNTED, EngineStats, Metrics
from moray.serve.metrics import EndpointMetrics


def test_every_total_says_what_it_counts() -> None:
    assert COUNTED.keys() == {field.name for field in fields(Metrics)}


def test_names_and_help_follow_the_conventions() -> None:
    stats = EngineStats(
        waiting_seqs=1,
        free_blocks=2,
        blocks=5,
        totals=Metrics(prompt_tokens=7, busy_s=1.5),
        max_num_seqs=64,
        max_num_batched_tokens=512,
    )
    engine: Any = SimpleNamespace(stats=lambda: stats, num_seqs=3, queued_tokens=4)
    metrics = EndpointMetrics(engine)
    metrics.requests.labels("/v1/completions", "200").inc()
    text = metrics.text({"in_progress": 1, "requests": 5}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, family in families.items():
        assert name.startswith("moray_") and not name.endswith(("_s", "_ms", "_mb", "_total")), name
        assert family.documentation[0].isupper() and family.documentation.endswith("."), family.documentation
    assert "moray_prompt_tokens_total 7.0" in text and "moray_busy_seconds_total 1.5" in text
    assert "moray_seqs 3.0" in text
