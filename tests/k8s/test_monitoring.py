"""components/monitoring: the dashboards are those of the installed Ray and of our metrics; names lead somewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import structural_schema
from dashboards import in_alerts, in_dashboard
from patience import PATIENCE_S
from rendered import K8S, Object, clusters, render

FOLDER = K8S / "components" / "monitoring"
OTHERS = ("up", "kube_pod_status_phase", "kuberay_job_deployment_status")  # Prometheus, kube-state-metrics, KubeRay


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
    subprocess.run([sys.executable, FOLDER / "dashboards.py", tmp_path], check=True, timeout=PATIENCE_S)
    committed, made = (
        {path.name: path.read_text() for path in folder.iterdir()} for folder in (FOLDER / "dashboards", tmp_path)
    )
    assert committed == made, "run `make dashboards`"


def test_dashboards_fit_into_config_maps(objects: tuple[Object, ...]) -> None:
    maps = [o for o in objects if o["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    assert len(maps) == 5
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


def test_alerts_name_metrics_of_others_that_exist() -> None:
    """Ours are looked for where they are emitted: tests/serve/test_api.py, tests/e2e/test_watching.py."""
    ray = (FOLDER / "dashboards" / "ray.json").read_text()
    theirs = {name for name in in_alerts() if not name.startswith("moray_")}
    assert theirs and not [name for name in theirs if name not in OTHERS and f"{name}{{" not in ray]
    assert all(name.startswith("moray_") for name in in_dashboard("moray.json"))
    assert all(name.startswith("ray_moray_") for name in in_dashboard("moray-jobs.json"))
