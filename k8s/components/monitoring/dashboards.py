"""Write the dashboards: Ray's own, as the installed Ray makes them, and two of moray.

That of the endpoint uses the metrics in serve/metrics.py, that of batch jobs those in batch/runtime/prometheus.py.

    python k8s/components/monitoring/dashboards.py [FOLDER]
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
COLUMNS = 24
HEIGHT = 8
PODS = '{namespace="$namespace"}'
JOB = '{job_name=~"$job"}'
ALIVE = '{job_name=~"$job", state="alive"}'

# title, unit of Grafana, queries with their legends
Panels = list[tuple[str, str, list[tuple[str, str]]]]

ENDPOINT: Panels = [
    (
        "Tokens",
        "short",
        [
            (f"sum(rate(moray_generated_tokens_total{PODS}[1m]))", "generated"),
            (f"sum(rate(moray_prompt_tokens_total{PODS}[1m]))", "prompt"),
            (f"sum(rate(moray_computed_tokens_total{PODS}[1m]))", "computed"),
        ],
    ),
    (
        "Requests",
        "reqps",
        [(f"sum by (path, status) (rate(moray_requests_total{PODS}[1m]))", "{{path}} {{status}}")],
    ),
    (
        "First token",
        "s",
        [
            (
                f"histogram_quantile({q}, sum by (le) (rate(moray_first_token_seconds_bucket{PODS}[5m])))",
                f"p{q * 100:g}",
            )
            for q in (0.5, 0.95, 0.99)
        ],
    ),
    (
        "Samples in the engine",
        "short",
        [
            (f"sum by (pod) (moray_seqs{PODS})", "{{pod}}"),
            (f"sum by (pod) (moray_waiting_seqs{PODS})", "{{pod}} waiting"),
        ],
    ),
    ("Tokens still to do", "short", [(f"sum by (pod) (moray_queued_tokens{PODS})", "{{pod}}")]),
    (
        "KV cache in use",
        "percentunit",
        [(f"1 - sum by (pod) (moray_free_blocks{PODS}) / sum by (pod) (moray_blocks{PODS})", "{{pod}}")],
    ),
    (
        "Prompt tokens found in the prefix cache",
        "percentunit",
        [
            (
                f"sum(rate(moray_cached_tokens_total{PODS}[5m])) / sum(rate(moray_prompt_tokens_total{PODS}[5m]))",
                "found",
            )
        ],
    ),
    ("Preemptions", "ops", [(f"sum by (pod) (rate(moray_preemptions_total{PODS}[5m]))", "{{pod}}")]),
    ("Limits lowered for want of memory", "short", [(f"sum by (pod) (moray_lowered_limits_total{PODS})", "{{pod}}")]),
    (
        "Time in steps",
        "percentunit",
        [(f"sum by (pod) (rate(moray_busy_seconds_total{PODS}[1m]))", "{{pod}}")],
    ),
    (
        "A step",
        "s",
        [
            (
                f"sum by (pod) (rate(moray_busy_seconds_total{PODS}[1m]))"
                f" / sum by (pod) (rate(moray_steps_total{PODS}[1m]))",
                "{{pod}}",
            )
        ],
    ),
]


JOBS: Panels = [
    ("Rows", "short", [(f"max by (job_name, state) (ray_moray_rows{JOB})", "{{job_name}} {{state}}")]),
    (
        "Tokens",
        "short",
        [
            (f"sum(rate(ray_moray_generated_tokens_total{JOB}[1m]))", "generated"),
            (f"sum(rate(ray_moray_prompt_tokens_total{JOB}[1m]))", "prompt"),
            (f"sum(rate(ray_moray_computed_tokens_total{JOB}[1m]))", "computed"),
        ],
    ),
    ("Time left", "s", [(f"max by (job_name, bound) (ray_moray_eta_seconds{JOB})", "{{job_name}} {{bound}}")]),
    ("Failed rows", "short", [(f"max by (job_name, code) (ray_moray_errors{JOB})", "{{job_name}} {{code}}")]),
    (
        "Structured outputs cut by max_tokens",
        "short",
        [(f"max by (job_name) (ray_moray_cut_rows{JOB})", "{{job_name}}")],
    ),
    ("Workers", "short", [(f"max by (job_name, state) (ray_moray_workers{JOB})", "{{job_name}} {{state}}")]),
    (
        "Time in steps",
        "percentunit",
        [
            (
                f"sum by (job_name) (rate(ray_moray_busy_seconds_total{JOB}[1m])) "
                f"/ sum by (job_name) (ray_moray_workers{ALIVE})",
                "{{job_name}}",
            )
        ],
    ),
    (
        "KV cache in use",
        "percentunit",
        [
            (
                f"1 - sum by (job_name) (ray_moray_free_blocks{JOB}) / sum by (job_name) (ray_moray_blocks{JOB})",
                "{{job_name}}",
            )
        ],
    ),
    (
        "Samples in the workers",
        "short",
        [
            (f"sum by (job_name) (ray_moray_seqs{JOB})", "{{job_name}}"),
            (f"sum by (job_name) (ray_moray_waiting_seqs{JOB})", "{{job_name}} waiting"),
        ],
    ),
    (
        "Prompt tokens found in the prefix cache",
        "percentunit",
        [
            (
                f"sum(rate(ray_moray_cached_tokens_total{JOB}[5m])) "
                f"/ sum(rate(ray_moray_prompt_tokens_total{JOB}[5m]))",
                "found",
            )
        ],
    ),
    (
        "Preemptions",
        "ops",
        [(f"sum by (job_name) (rate(ray_moray_preemptions_total{JOB}[5m]))", "{{job_name}}")],
    ),
    (
        "Limits lowered for want of memory",
        "short",
        [(f"sum by (job_name) (ray_moray_lowered_limits_total{JOB})", "{{job_name}}")],
    ),
    (
        "A step",
        "s",
        [(f"sum(rate(ray_moray_busy_seconds_total{JOB}[1m])) / sum(rate(ray_moray_steps_total{JOB}[1m]))", "a step")],
    ),
    (
        "Hours held",
        "short",
        [
            (f"max by (job_name) (ray_moray_worker_seconds{JOB}) / 3600", "{{job_name}} workers"),
            (f"max by (job_name) (ray_moray_gpu_seconds{JOB}) / 3600", "{{job_name}} GPUs"),
        ],
    ),
    (
        "Cost of the GPUs so far",
        "currencyUSD",
        [(f"max by (job_name) (ray_moray_gpu_seconds{JOB}) / 3600 * $price", "{{job_name}}")],
    ),
]

NAMESPACE = {"name": "namespace", "type": "textbox", "query": "moray"}
JOB_NAME = {
    "name": "job",
    "type": "query",
    "datasource": {"type": "prometheus", "uid": "${datasource}"},
    "query": "label_values(ray_moray_rows, job_name)",
    "refresh": 2,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": ["All"], "value": ["$__all"]},
}
PRICE = {"name": "price", "type": "textbox", "query": "0", "label": "USD for a GPU for an hour"}


def dashboards() -> dict[str, str]:
    """Return the text of each file, by its name."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as ray

    makers: dict[str, Callable[[], tuple[str, str]]] = {
        "ray.json": ray.generate_default_grafana_dashboard,
        "ray-data.json": ray.generate_data_grafana_dashboard,
        "ray-serve.json": ray.generate_serve_grafana_dashboard,
    }
    made = {name: json.dumps(json.loads(make()[0]), sort_keys=True) for name, make in makers.items()}
    ours = {
        "moray.json": _dashboard("moray", "moray", ENDPOINT, NAMESPACE),
        "moray-jobs.json": _dashboard("moray jobs", "moray-jobs", JOBS, JOB_NAME, PRICE),
    }
    made |= {name: json.dumps(dashboard, indent=1) for name, dashboard in ours.items()}
    return {name: f"{text}\n" for name, text in made.items()}


def _dashboard(title: str, uid: str, panels: Panels, *variables: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": title,
        "uid": uid,
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, *variables]},
        "panels": [_panel(index, *panel) for index, panel in enumerate(panels)],
    }


def _panel(index: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    width = COLUMNS // 2
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": index % 2 * width, "y": index // 2 * HEIGHT, "w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (expression, legend) in enumerate(queries)
        ],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, text in dashboards().items():
        (folder / name).write_text(text)
