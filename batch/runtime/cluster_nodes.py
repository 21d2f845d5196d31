"""The nodes of the Ray cluster that this process is connected to, in the form that planning uses."""

from collections.abc import Iterable, Mapping
from typing import Any

import ray

from moray.batch.plan.nodes import Node


def cluster_nodes(only: str | None = None) -> list[Node]:
    """Return the nodes that are alive; with `only`, just the node with that id."""
    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    found = (node for node in nodes if node["Alive"] and only in (None, node["NodeID"]))
    return [Node(node["Resources"], node.get("Labels") or {}) for node in found]


def has_process(actors: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether one of the actors has a process, or had one.

    actors:  actors as Ray's state lists them. Their node id does not show this: it may be that of a node that Ray has
             only asked to start the actor
    """
    return any(actor["Pid"] for actor in actors)
