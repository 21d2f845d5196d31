"""Place a spec's workers in the worker groups of a RayCluster: choose the groups and the number of pods. Pure."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moray.batch.plan.nodes import Node, Placement
from moray.batch.spec import JobSpec
from moray.engine.errors import Problem, SpecError

GPU = "nvidia.com/gpu"  # Kubernetes' resource
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # a plain value of a label, not a selector such as !value


def place_workers(spec: JobSpec, groups: Sequence[dict[str, Any]]) -> JobSpec:
    """Set the groups' maxReplicas, and labels that the spec asks for, in place. Return the spec with workers.gpus and
    workers.max as numbers: `auto` counts the nodes of a cluster, which do not exist before the job asks for them.

    groups:  workerGroupSpecs of a RayCluster

    Raises SpecError where no group fits.
    """
    workers = spec.workers
    has_gpus = any(_limits(group).get(GPU) for group in groups)
    gpus = spec.gpus_per_worker(has_gpus=has_gpus)
    cpus = 1.0 if workers.cpus == "auto" else workers.cpus
    candidates = [group for group in groups if bool(_limits(group).get(GPU)) == bool(gpus)]
    _add_labels(candidates, workers.labels)
    placement = Placement(cpus, gpus, workers.accelerator, workers.labels)
    fitting = _find(groups, candidates, placement, "workers")

    io_groups = [group for group in groups if group not in candidates] or groups
    _add_labels(io_groups, workers.io_labels)
    _find(groups, groups, Placement(0.0, labels=workers.io_labels), "workers.io_labels")

    # Without GPUs a pod has one worker, since its threads use all cores.
    pod_workers = min(placement.num_by_gpus(node_of(group)) for group in fitting) if gpus else 1
    capacity = max(group["maxReplicas"] for group in fitting) * pod_workers
    max_workers = max(workers.min, capacity) if workers.max == "auto" else workers.max
    for group in fitting:
        group["maxReplicas"] = math.ceil(max_workers / pod_workers)
    return spec.model_copy(update={"workers": workers.model_copy(update={"gpus": gpus, "max": max_workers})})


def node_of(group: Mapping[str, Any]) -> Node:
    """Return a node of the group as Ray's autoscaler expects it before it exists."""
    limits = _limits(group)
    resources = {"CPU": _number(limits["cpu"]), "GPU": _number(limits.get(GPU, "0"))}
    named = {name: _number(amount) for name, amount in group.get("resources", {}).items()}
    return Node(resources | named, group.get("labels", {}))


def _find(
    groups: Sequence[dict[str, Any]], candidates: Sequence[dict[str, Any]], placement: Placement, key: str
) -> list[dict[str, Any]]:
    if fitting := [group for group in candidates if placement.fits(node_of(group))]:
        return fitting
    known = ", ".join(f"{group['groupName']} ({node_of(group)}{_labels(group)})" for group in groups)
    message = f"no group of the overlay has {placement}; its groups: {known}. Change it, or give another --overlay"
    raise SpecError([Problem(key, message)])


def _add_labels(groups: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> None:
    """Add each label that none of the groups has to all of them: a spec that asks for it means these groups."""
    for name, value in labels.items():
        if _PLAIN.fullmatch(value) and not any(name in group.get("labels", {}) for group in groups):
            for group in groups:
                group["labels"] = {**group.get("labels", {}), name: value}


def _labels(group: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in group.get("labels", {}).items())


def _limits(group: Mapping[str, Any]) -> dict[str, str]:
    """Return the resource limits of the first container, which is Ray's."""
    container = group["template"]["spec"]["containers"][0]
    return dict(container.get("resources", {}).get("limits", {}))


def _number(quantity: str) -> float:
    """Convert Kubernetes' quantities `2` and `500m` as KubeRay does, which rounds CPUs up to whole ones."""
    text = str(quantity)
    return float(math.ceil(int(text[:-1]) / 1000)) if text.endswith("m") else float(text)
