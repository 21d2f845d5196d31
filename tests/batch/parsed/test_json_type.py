"""The type of a column for every shape of a JSON schema, and JSON text for those that no one type holds."""

import json
from typing import Any

import pyarrow as pa
import pytest

from moray.batch.parsed.column import arrow_type
from moray.batch.parsed.json_type import JsonType

ADDRESS = {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]}
DEFS = {
    "Address": ADDRESS,
    "Node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}},
    "Closed": ADDRESS | {"additionalProperties": False},
    "Label": {"type": "string", "enum": ["a", "b"]},
}


def type_of(schema: Any) -> str:
    """Return the type of a property with this schema, as Arrow writes it."""
    root = {"type": "object", "properties": {"it": schema}, "$defs": DEFS}
    found: Any = arrow_type(JsonType.of_structured("json_schema", json.dumps(root)))
    assert isinstance(found, pa.StructType)
    return str(found.field("it").type)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "maxLength": 5, "description": "d"}, "string"),
        ({"type": "string", "format": "date"}, "string"),
        ({"type": "integer", "minimum": 0}, "int64"),
        ({"type": "number"}, "double"),
        ({"type": "boolean"}, "bool"),
        ({"type": ["integer", "null"]}, "int64"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "It"}, "int64"),
        ({"oneOf": [{"const": None}, {"type": "boolean"}]}, "bool"),
        ({"enum": ["x", "y", None]}, "string"),
        ({"anyOf": [{"type": "number"}, {"enum": [None]}]}, "double"),
        ({"enum": [1, 2]}, "int64"),
        ({"enum": [1, 2.5]}, "double"),
        ({"const": True}, "bool"),
        ({"type": "array", "items": {"type": "number"}}, "list<element: double>"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
         "list<element: list<element: string>>"),
        (ADDRESS, "struct<street: string>"),
        ({"$ref": "#/$defs/Address"}, "struct<street: string>"),
        ({"allOf": [{"$ref": "#/$defs/Closed"}], "description": "d"}, "struct<street: string>"),
        ({"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}]}, "struct<street: string>"),
        ({"type": "array", "items": {"$ref": "#/$defs/Label"}}, "list<element: string>"),
        ({"anyOf": [{"type": "string", "maxLength": 3}, {"enum": ["long"]}]}, "string"),
        ({"$ref": "#/$defs/Node"}, "struct<value: int64, next: string>"),
    ],
)  # fmt: skip
def test_a_type_that_holds_the_values(schema: Any, expected: str) -> None:
    assert type_of(schema).replace("item: ", "element: ") == expected


@pytest.mark.parametrize(
    "schema",
    [
        True, {}, {"description": "anything"},
        {"type": ["string", "integer"]},
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "null"}, {"enum": [None]}, {"enum": ["a", 1]}, {"const": {"a": 1}},
        {"type": "object"}, {"type": "object", "properties": {}, "additionalProperties": False},
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": True},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        {"allOf": [{"$ref": "#/$defs/Address"}]},  # which stays open
        {"allOf": [{"$ref": "#/$defs/Address"}, {"properties": {"more": {"type": "string"}}}]},
        {"$ref": "#/$defs/Address", "required": ["street"]},
        {"properties": {"a": {"type": "string"}}},
        {"$ref": "#"},
    ],
)  # fmt: skip
def test_what_no_type_holds_stays_json(schema: Any) -> None:
    assert type_of(schema) == "string"
    root = {"type": "object", "properties": {"it": schema}, "$defs": DEFS}
    found = JsonType.of_structured("json_schema", json.dumps(root))
    assert found.fields["it"] == JsonType("json")


def test_a_list_of_anything_is_a_list_of_json() -> None:
    assert JsonType.of_structured("json_schema", '{"type":"array"}') == JsonType("array", items=JsonType("json"))


def test_a_schema_that_is_nested_deeply_ends_as_json() -> None:
    schema: Any = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    found: JsonType | None = JsonType.of_structured("json_schema", json.dumps(schema))
    depth = 0
    while found is not None and found.kind == "array":
        found, depth = found.items, depth + 1
    assert found == JsonType("json") and 10 < depth < 60


def test_references_that_repeat_without_end_are_refused() -> None:
    unions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9} for i in range(40)}
    schema = {"$ref": "#/$defs/d0", "$defs": unions | {"d40": {"type": "string"}}}
    with pytest.raises(ValueError, match="the schema has more than 20,000 parts"):
        JsonType.of_structured("json_schema", json.dumps(schema))


def test_any_object_has_no_type() -> None:
    assert JsonType.of_structured("json_object", True) == JsonType("json")
