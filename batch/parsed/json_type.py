"""JsonType: the type of what a JSON schema describes, as far as a typed column can hold it. Pure."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moray.engine.structured import json_schema

MAX_FIELDS = 1_000  # of a column, at all depths: a schema whose parts refer to each other twice grows without end
_MAX_READ = 20_000  # schemas that are read for a column, those that references repeat each time
_MAX_DEPTH = 30  # beyond it values stay JSON
# Keywords that say nothing about the type of a value that obeys the rest.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"$comment", "$id", "$schema", "$defs", "definitions", json_schema.GUIDANCE}
)
_SCALARS = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}


@dataclass(frozen=True)
class JsonType:
    """Describes the values that a schema allows. A value of any type may be null.

    kind:    json = no one type holds them: they stay JSON text
    fields:  of an object, its properties in the schema's order
    items:   of an array
    """

    kind: Literal["text", "integer", "number", "boolean", "object", "array", "json"]
    fields: Mapping[str, "JsonType"] = field(default_factory=dict)
    items: "JsonType | None" = None

    @classmethod
    def of_structured(cls, kind: str, text: object) -> "JsonType":
        """Return the type of JSON that obeys a schema, or of any object (json_object).

        kind, text:  those of a Structured

        Raises ValueError where a column would have too many fields.
        """
        if kind != "json_schema":
            return JSON
        schema = json_schema.prepare(json.loads(str(text)))
        return _Reader(schema).read(schema, ())


JSON = JsonType("json")


class _Reader:
    """Reads the type of each schema in a document, following its references."""

    def __init__(self, root: json_schema.Schema) -> None:
        self._root = root
        self._num_fields = self._num_read = 0

    def read(self, schema: json_schema.Schema, path: tuple[str, ...]) -> JsonType:
        """Return the type of a schema.

        path:  what leads to it: the pointers of references that are being followed, and empty texts for other steps
        """
        self._num_read += 1
        if self._num_read > _MAX_READ:
            raise ValueError(f"the schema has more than {_MAX_READ:,} parts, with those that references repeat")
        if isinstance(schema, bool) or len(path) > _MAX_DEPTH:
            return JSON
        rules = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        if rules.keys() == {"$ref"}:
            return self._follow(rules["$ref"], path)
        if rules.keys() == {"allOf"} and len(rules["allOf"]) == 1:
            return self.read(rules["allOf"][0], (*path, ""))
        for union in ("anyOf", "oneOf"):
            if rules.keys() == {union}:
                return self._join(rules[union], path)
        if not rules.keys().isdisjoint({"$ref", "allOf", "anyOf", "oneOf"}):
            return JSON
        if "const" in rules or "enum" in rules:
            return _of_values([rules["const"]] if "const" in rules else rules["enum"])
        return self._of_type(rules, path)

    def _follow(self, reference: Any, path: tuple[str, ...]) -> JsonType:
        """Return the type that a reference points to; JSON where it points to what it is in."""
        target = json_schema.resolve(self._root, reference)
        if target is None or target[0] in path or target[0] == "":
            return JSON
        return self.read(target[1], (*path, target[0]))

    def _join(self, schemas: Iterable[json_schema.Schema], path: tuple[str, ...]) -> JsonType:
        """Return the type that all alternatives have; null is one of each type."""
        types = [self.read(schema, (*path, "")) for schema in schemas if not _is_null(schema)]
        return types[0] if types and all(one == types[0] for one in types) else JSON

    def _of_type(self, rules: Mapping[str, Any], path: tuple[str, ...]) -> JsonType:
        given = rules.get("type")
        names = [name for name in ([given] if isinstance(given, str) else given or ()) if name != "null"]
        if len(names) != 1:
            return JSON
        (name,) = names
        if name in _SCALARS:
            return JsonType(_SCALARS[name])  # type: ignore[arg-type]
        if name == "array":
            is_tuple = "prefixItems" in rules or not isinstance(rules.get("items", True), Mapping | bool)
            return JSON if is_tuple else JsonType("array", items=self.read(rules.get("items", True), (*path, "")))
        return self._of_object(rules, path)

    def _of_object(self, rules: Mapping[str, Any], path: tuple[str, ...]) -> JsonType:
        """Return a type with a field for each property; JSON where an object may have other properties, or has none."""
        properties = rules.get("properties")
        if not properties or rules.get("additionalProperties") is not False or rules.get("patternProperties"):
            return JSON
        self._num_fields += len(properties)
        if self._num_fields > MAX_FIELDS:
            raise ValueError(f"the schema has more than {MAX_FIELDS:,} fields, with those that references repeat")
        return JsonType("object", {name: self.read(inner, (*path, "")) for name, inner in properties.items()})


def _is_null(schema: json_schema.Schema) -> bool:
    return isinstance(schema, Mapping) and (
        schema.get("type") == "null" or schema.get("const", 0) is None or schema.get("enum") == [None]
    )


def _of_values(values: Iterable[Any]) -> JsonType:
    """Return the one type of the values that a schema lists."""
    kinds = {_kind_of(value) for value in values if value is not None}
    if kinds == {"integer", "number"}:
        return JsonType("number")
    return JsonType(kinds.pop()) if len(kinds) == 1 else JSON  # type: ignore[arg-type]


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return {str: "text", int: "integer", float: "number"}.get(type(value), "json")
