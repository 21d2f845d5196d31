"""Nodes that can run an actor, as a table."""

import pytest

from moray.batch.plan.nodes import Node, Placement, explain_unschedulable

CPU = Node({"CPU": 8.0}, {"ray.io/node-group": "cpu"})
GPU = Node({"CPU": 16.0, "GPU": 2.0, "accelerator_type:A100": 1.0}, {"disk": "fast"})
LABELLED = Node({"CPU": 4.0, "GPU": 1.0}, {"ray.io/accelerator-type": "H200"})


@pytest.mark.parametrize(
    ("placement", "fitting"),
    [
        (Placement(0.5), [CPU, GPU, LABELLED]),
        (Placement(5.0), [CPU, GPU]),
        (Placement(0.5, 0.5), [GPU, LABELLED]),
        (Placement(0.5, 1.0, "A100"), [GPU]),
        (Placement(0.5, 1.0, "H200"), [LABELLED]),
        (Placement(0.5, 1.0, "L4"), []),
        (Placement(0.5, labels={"disk": "fast"}), [GPU]),
        (Placement(0.5, labels={"disk": "!fast"}), [CPU, LABELLED]),
        (Placement(0.5, labels={"disk": "in(slow, fast)"}), [GPU]),
        (Placement(0.5, labels={"disk": "!in(slow,fast)", "ray.io/node-group": "cpu"}), [CPU]),
    ],
)
def test_nodes_that_fit(placement: Placement, fitting: list[Node]) -> None:
    assert [node for node in (CPU, GPU, LABELLED) if placement.fits(node)] == fitting


def test_what_ray_is_told() -> None:
    assert Placement(0.5).ray_options() == {"num_cpus": 0.5, "num_gpus": None}
    assert Placement(0.5, 1.0, "A100", {"disk": "fast"}).ray_options() == {
        "num_cpus": 0.5,
        "num_gpus": 1.0,
        "accelerator_type": "A100",
        "label_selector": {"disk": "fast"},
    }


def test_why_there_is_no_place() -> None:
    wanted = Placement(0.5, 1.0, "L4", {"disk": "fast"})
    assert explain_unschedulable(wanted, [CPU, CPU, GPU]) == (
        "no node has 1 GPU (L4) and 0.5 CPUs and the labels disk=fast; "
        "the cluster has 1 x 16 CPUs and 2 GPUs (A100), 2 x 8 CPUs"
    )
    assert explain_unschedulable(Placement(0.2), []) == "no node has 0.2 CPUs; the cluster has no node"
    assert explain_unschedulable(Placement(0.5, 1.0), [CPU, GPU]) == (
        "1 of 2 nodes could run it, but are busy, or still starting its process"
    )
    assert explain_unschedulable(Placement(0.5), [CPU, GPU]).startswith("2 of 2 nodes could run it, but are busy")
    assert explain_unschedulable(Placement(0.5, 4.0), [GPU]).startswith("no node has 4 GPUs and 0.5 CPUs; ")
    own = explain_unschedulable(Placement(0.5), [CPU], is_own=True)
    assert own == "there is room for it, and Ray is still starting its process"
    assert explain_unschedulable(Placement(0.5, 1.0), [CPU], is_own=True).startswith("no node has 1 GPU and 0.5 CPUs; ")
