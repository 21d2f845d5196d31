"""Checks an object against a CRD as an API server with strict field validation does: nulls are dropped, defaults
filled in, then the schema, with unknown fields refused, unique keys of list maps, and CEL rules.

Rules that compare with the object before (oldSelf) are left out: there is none.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import yaml
from celpy.adapter import json_to_cel

Schema = dict[str, Any]


@cache
def load_crds(folder: Path) -> dict[tuple[str, str], Schema]:
    """(apiVersion, kind) -> openAPIV3Schema."""
    found = {}
    for path in folder.glob("*.yaml"):
        crds = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        for crd in crds if isinstance(crds, list) else [crds]:
            names = crd["spec"]["names"]
            for version in crd["spec"]["versions"]:
                key = (f"{crd['spec']['group']}/{version['name']}", names["kind"])
                found[key] = version["schema"]["openAPIV3Schema"]
    return found


def problems(schema: Schema, o: dict[str, Any]) -> list[str]:
    o = copy.deepcopy(o)
    _fill(schema, o)
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in _validator(schema).iter_errors(o)
    ]
    return found + _rules(schema, o, "")


def _fill(schema: Schema, value: Any) -> None:
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        for key in [key for key, inner in value.items() if inner is None and not fields.get(key, {}).get("nullable")]:
            del value[key]
        for key, inner in fields.items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
        for key, inner in value.items():
            _fill(_field(schema, key), inner)
    elif isinstance(value, list):
        for inner in value:
            _fill(schema.get("items", {}), inner)


def _field(schema: Schema, key: str) -> Schema:
    inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    return inner if isinstance(inner, dict) else {}


_VALIDATORS: dict[int, tuple[Schema, Any]] = {}


def _validator(schema: Schema) -> Any:
    if id(schema) not in _VALIDATORS:
        closed = _closed(schema)
        closed["properties"]["metadata"] = {"type": "object"}  # the server knows it by itself
        _VALIDATORS[id(schema)] = (schema, jsonschema.Draft202012Validator(closed))
    return _VALIDATORS[id(schema)][1]


def _closed(schema: Any) -> Any:
    """The structural schema as a JSON schema in which what is not named is refused."""
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    out.pop("default", None)
    is_nullable = out.pop("nullable", False)
    if out.pop("format", None) == "int32":
        out = {"minimum": -(2**31), "maximum": 2**31 - 1} | out
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in out:
        out["properties"] = {key: _closed(value) for key, value in out["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = _closed(out[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = [_closed(value) for value in out[key]]
    return {"anyOf": [out, {"type": "null"}]} if is_nullable else out


def _rules(schema: Schema, value: Any, path: str) -> list[str]:
    found = []
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            found.append(f"{path}: {rule.get('message', rule['rule'])}")
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _rules(_field(schema, key), inner, f"{path}.{key}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        seen: set[tuple[Any, ...]] = set()
        for index, inner in enumerate(value):
            found += _rules(schema.get("items", {}), inner, f"{path}[{index}]")
            if keys and isinstance(inner, dict):
                identity = tuple(inner.get(key) for key in keys)
                if identity in seen:
                    found.append(f"{path}[{index}]: {identity} is there twice")
                seen.add(identity)
    return found


def _holds(rule: str, value: Any) -> bool:
    try:
        return bool(_program(rule).evaluate({"self": json_to_cel(value)}))
    except celpy.CELEvalError:
        return False


@cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))
