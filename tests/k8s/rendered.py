"""What kustomize makes of the folders of k8s/."""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from patience import PATIENCE_S
from repository import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(str(path.parent.relative_to(K8S)) for path in K8S.glob("overlays/*/*/kustomization.yaml"))
APPLIED = [name for name in OVERLAYS if name.split("/")[-1] in ("batch", "pool", "prefetch", "service")]
WITH_CLUSTER = [name for name in APPLIED if not name.endswith("prefetch")]
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Object = dict[str, Any]


def kustomize() -> list[str] | None:
    """The command that renders a folder; None where this machine has none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


@cache
def render(folder: Path) -> tuple[Object, ...]:
    """The objects; do not change them, they are shared. Fails with what kustomize says. Without it (no Python
    package brings it) the test is skipped."""
    command = kustomize()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on this machine")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return tuple(yaml.safe_load_all(done.stdout))


def cluster_spec(ray: Object) -> Object:
    """The RayCluster's spec in a RayCluster, a RayJob or a RayService."""
    inside: dict[str, tuple[str, ...]] = {"RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    spec = ray["spec"]
    for key in inside.get(ray["kind"], ()):
        spec = spec[key]
    return dict(spec)


def clusters(objects: tuple[Object, ...]) -> list[Object]:
    return [cluster_spec(o) for o in objects if o["kind"] in RAY_KINDS]


def pod_templates(objects: tuple[Object, ...]) -> list[tuple[str, Object]]:
    """(where, template) of every pod that the objects lead to."""
    found = []
    for o in objects:
        name = f"{o['kind']} {o['metadata']['name']}"
        if o["kind"] in RAY_KINDS:
            spec = cluster_spec(o)
            found.append((f"{name} head", spec["headGroupSpec"]["template"]))
            found += [(f"{name} {group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"]]
        elif o["kind"] in ("Job", "StatefulSet"):
            found.append((name, o["spec"]["template"]))
    return found
