"""Checks Kubernetes' own objects, and the pod templates inside Ray's, against the schemas of its API, closed ones."""

import importlib.resources
import json
from functools import cache
from typing import Any

import jsonschema
from referencing import Registry, Resource
from rendered import RAY_KINDS, Object, pod_templates

FOLDER = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / "v1.32.0-local-strict"
OPERATORS = ("monitoring.coreos.com/v1",)  # of an operator, as Ray's; no schema of theirs is here


def problems(objects: tuple[Object, ...]) -> list[str]:
    whole = [o for o in objects if o["kind"] not in RAY_KINDS and o["apiVersion"] not in OPERATORS]
    found = [problem for o in whole for problem in _check(o, f"{o['kind']} {o['metadata']['name']}")]
    for where, template in pod_templates(objects):
        found += _check({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, where)
    return found


def _check(o: Object, where: str) -> list[str]:
    group, _, version = o["apiVersion"].rpartition("/")
    name = "-".join(part for part in (o["kind"].lower(), group.partition(".")[0], version) if part)
    return [
        f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in _validator(f"{name}.json").iter_errors(o)
    ]


@cache
def _validator(name: str) -> Any:
    schema = json.loads((FOLDER / name).read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry())


@cache
def _registry() -> Any:
    return Resource.from_contents(json.loads((FOLDER / "_definitions.json").read_text())) @ Registry()
