"""components/monitoring: the dashboards are those of the installed Ray and of our metrics; names lead somewhere."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structural_schema
from rendered import K8S, Object, clusters, render

from engine.metrics import Metrics

FOLDER = K8S / "components" / "monitoring"
OTHERS = ("up", "kube_pod_status_phase", "kuberay_job_deployment_status")  # Prometheus, kube-state-metrics, KubeRay
ENDPOINT = {
    "requests_total",
    "first_token_seconds_bucket",
    "seqs",
    "waiting_seqs",
    "queued_tokens",
    "free_blocks",
    "blocks",
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Object, ...]:
    """An endpoint with the component."""
    folder = tmp_path_factory.mktemp("monitored")
    text = f"""
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [{os.path.relpath(K8S / "overlays/aks/service", folder)}]
components: [{os.path.relpath(FOLDER, folder)}]
"""
    (folder / "kustomization.yaml").write_text(text)
    return render(folder)


def test_dashboards_are_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "dashboards.py", tmp_path], check=True, timeout=60)
    committed, made = (
        {path.name: path.read_text() for path in folder.iterdir()} for folder in (FOLDER / "dashboards", tmp_path)
    )
    assert committed == made, "run `make dashboards`"


def test_dashboards_fit_into_config_maps(objects: tuple[Object, ...]) -> None:
    maps = [o for o in objects if o["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    assert len(maps) == 4
    assert all(len(text) < 1 << 20 for o in maps for text in o["data"].values())


def test_prometheus_takes_them(objects: tuple[Object, ...]) -> None:
    schemas = structural_schema.load_crds(Path(__file__).parent / "crds")
    theirs = [o for o in objects if o["apiVersion"] == "monitoring.coreos.com/v1"]
    assert sorted(o["kind"] for o in theirs) == ["PodMonitor", "PodMonitor", "PrometheusRule"]
    for o in theirs:
        assert structural_schema.problems(schemas[o["apiVersion"], o["kind"]], o) == []


def test_monitors_find_ports_and_labels(objects: tuple[Object, ...]) -> None:
    (cluster,) = clusters(objects)
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    ports = {port["name"] for pod in pods for port in pod["spec"]["containers"][0]["ports"]}
    kuberay = {"ray.io/is-ray-node", "ray.io/node-type", "ray.io/serve"}
    for monitor in (o for o in objects if o["kind"] == "PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
        wanted = {k: v for k, v in monitor["spec"]["selector"]["matchLabels"].items() if k not in kuberay}
        assert all(wanted.items() <= pod["metadata"]["labels"].items() for pod in pods)


def test_every_metric_exists(objects: tuple[Object, ...]) -> None:
    (rule,) = (o for o in objects if o["kind"] == "PrometheusRule")
    dashboard = json.loads((FOLDER / "dashboards" / "moray.json").read_text())
    expressions = [rule["expr"] for group in rule["spec"]["groups"] for rule in group["rules"]]
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"([a-z_]+)\{", text)}
    ray = (FOLDER / "dashboards" / "ray.json").read_text()
    ours = {f"moray_{field.name}_total" for field in dataclasses.fields(Metrics)} | {
        f"moray_{name}" for name in ENDPOINT
    }
    assert not [name for name in named if name not in OTHERS and name not in ours and f"{name}{{" not in ray]
    assert {f"moray_{field.name}_total" for field in dataclasses.fields(Metrics)} <= named


def test_endpoint_has_those_metrics() -> None:
    metrics = pytest.importorskip("serve.metrics")
    assert set(metrics.GAUGES) == {name for name in ENDPOINT if not name.endswith(("_total", "_bucket"))}
