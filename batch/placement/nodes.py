"""Placement: which nodes of a cluster can take an actor, by resources, card and labels; and why none does. Pure."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CARD = "ray.io/accelerator-type"  # the label in which Ray says what a node's GPUs are
_LIST = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class Node:
    """resources, labels: as Ray has them."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def card(self) -> str | None:
        """The type of its GPUs, by Ray's names."""
        named = (name.partition(":")[2] for name in self.resources if name.startswith("accelerator_type:"))
        return self.labels.get(CARD) or next(named, None)

    def __str__(self) -> str:
        cpus, gpus = self.resources.get("CPU", 0), self.resources.get("GPU", 0)
        card = f" ({self.card})" if self.card else ""
        return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs{card}" if gpus else "")


@dataclass(frozen=True)
class Placement:
    """What an actor asks of its node.

    card:    a type of GPU, by Ray's names
    labels:  label -> `value`, `!value`, `in(a, b)` or `!in(a, b)`, as Ray's label selectors
    """

    cpus: float
    gpus: float = 0.0
    card: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def fits(self, node: Node) -> bool:
        """Whether the node could take it if nothing else ran there."""
        return (
            node.resources.get("CPU", 0.0) >= self.cpus
            and node.resources.get("GPU", 0.0) >= self.gpus
            and self.card in (None, node.card)
            and all(_selects(wanted, node.labels.get(name)) for name, wanted in self.labels.items())
        )

    def ray_options(self) -> dict[str, Any]:
        """For ray.remote and map_batches."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus or None}
        if self.card is not None:
            options["accelerator_type"] = self.card
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} GPU{f' ({self.card})' if self.card else ''} and " if self.gpus else ""
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return f"{gpus}{self.cpus:g} CPUs" + (f" and the labels {labels}" if labels else "")


def explain_absence(placement: Placement, nodes: Sequence[Node]) -> str:
    """Why an actor of that kind is not there yet."""
    if fitting := sum(map(placement.fits, nodes)):
        return f"{fitting} of {len(nodes)} nodes could take it, but are busy"
    kinds = Counter(map(str, nodes))
    there = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items())) or "no node"
    return f"no node has {placement}; the cluster has {there}"


def _selects(wanted: str, value: str | None) -> bool:
    is_not = wanted.startswith("!")
    wanted = wanted.removeprefix("!")
    several = _LIST.fullmatch(wanted)
    allowed = [word.strip() for word in several[1].split(",")] if several else [wanted]
    return (value in allowed) != is_not
