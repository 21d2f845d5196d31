"""Placement: which nodes of a cluster can run an actor, by resources, GPU model and labels, and why none does. Pure."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GPU_LABEL = "ray.io/accelerator-type"  # Ray's label with the model of a node's GPUs
_LIST = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class Node:
    """Describes a node of a cluster.

    resources: name -> amount in all, as Ray reports them, such as CPU and GPU
    labels:    Ray's node labels
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def gpu_model(self) -> str | None:
        """Return the model of its GPUs, by Ray's names; None where Ray does not know it."""
        named = (name.partition(":")[2] for name in self.resources if name.startswith("accelerator_type:"))
        return self.labels.get(GPU_LABEL) or next(named, None)

    def __str__(self) -> str:
        cpus, gpus = self.resources.get("CPU", 0), self.resources.get("GPU", 0)
        model = f" ({self.gpu_model})" if self.gpu_model else ""
        return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs{model}" if gpus else "")


@dataclass(frozen=True)
class Placement:
    """Describes what an actor asks of its node.

    cpus, gpus:  Ray's logical resources
    gpu_model:   model of GPU, by Ray's names; None = any
    labels:      label -> `value`, `!value`, `in(a, b)` or `!in(a, b)`, as in Ray's label selectors
    """

    cpus: float
    gpus: float = 0.0
    gpu_model: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def num_by_gpus(self, node: Node) -> int:
        """Return how many actors with GPUs the node's GPUs allow. A share of a GPU is of one GPU."""
        gpus = int(node.resources.get("GPU", 0.0))
        return gpus // int(self.gpus) if self.gpus >= 1 else gpus * int(1 / self.gpus + 1e-9)

    def fits(self, node: Node) -> bool:
        """Return whether the node could run the actor if nothing else ran there."""
        return (
            node.resources.get("CPU", 0.0) >= self.cpus
            and node.resources.get("GPU", 0.0) >= self.gpus
            and self.gpu_model in (None, node.gpu_model)
            and all(_matches(selector, node.labels.get(name)) for name, selector in self.labels.items())
        )

    def ray_options(self) -> dict[str, Any]:
        """Return the arguments for ray.remote and map_batches."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus or None}
        if self.gpu_model is not None:
            options["accelerator_type"] = self.gpu_model
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    def __str__(self) -> str:
        noun = f"GPU{'s' if self.gpus > 1 else ''}{f' ({self.gpu_model})' if self.gpu_model else ''}"
        gpus = f"{self.gpus:g} {noun} and " if self.gpus else ""
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return f"{gpus}{self.cpus:g} CPUs" + (f" and the labels {labels}" if labels else "")


def explain_unschedulable(placement: Placement, nodes: Sequence[Node], *, is_own: bool = False) -> str:
    """Return why no actor with this placement has started yet.

    is_own: nothing else runs on the nodes. On shared nodes Ray does not show whether a node is full or just starting
            the actor's process, which may take long where the machine is slow
    """
    if fitting := sum(map(placement.fits, nodes)):
        if is_own:
            return "there is room for it, and Ray is still starting its process"
        return f"{fitting} of {len(nodes)} nodes could run it, but are busy, or still starting its process"
    kinds = Counter(map(str, nodes))
    available = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items())) or "no node"
    return f"no node has {placement}; the cluster has {available}"


def _matches(selector: str, value: str | None) -> bool:
    is_not = selector.startswith("!")
    selector = selector.removeprefix("!")
    several = _LIST.fullmatch(selector)
    allowed = [word.strip() for word in several[1].split(",")] if several else [selector]
    return (value in allowed) != is_not
