"""Every folder that can be applied, checked as far as that goes without a cluster."""

import os
from pathlib import Path

import core_schema
import house_rules
import operator_rules
import pytest
import references
import structural_schema
from rendered import APPLIED, K8S, RAY_KINDS, Object, render

KINDS = ("batch", "pool", "prefetch", "service")
REDUCED = Path(__file__).parent / "crds"
KUBERAY = [Path(os.environ["KUBERAY_CRD_DIR"])] if "KUBERAY_CRD_DIR" in os.environ else []


def schema_problems(objects: tuple[Object, ...]) -> list[str]:
    return [
        f"{o['kind']}{problem}"
        for folder in [REDUCED, *KUBERAY]
        for o in objects
        if o["kind"] in RAY_KINDS
        for problem in structural_schema.problems(structural_schema.load_crds(folder)[o["apiVersion"], o["kind"]], o)
    ]


CHECKS = {
    "schema": schema_problems,
    "core": core_schema.problems,
    "operator": operator_rules.problems,
    "references": references.problems,
    "house": house_rules.problems,
}


def test_each_cloud_has_each_kind() -> None:
    expected = {f"overlays/{cloud}/{kind}" for cloud in ("aks", "cpu", "eks", "gke") for kind in KINDS}
    expected |= {f"overlays/aks-{gpus}gpu/{kind}" for gpus in (2, 4, 8) for kind in KINDS if kind != "pool"}
    assert set(APPLIED) == expected - {"overlays/cpu/prefetch"}  # the image has its model


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("folder", ["base", *APPLIED])
def test_overlay(folder: str, check) -> None:
    assert check(render(K8S / folder)) == []
