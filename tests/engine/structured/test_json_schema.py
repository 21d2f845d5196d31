"""The preparation of JSON schemas: compact, closed where that is sound, and in the given order."""

from typing import Any

import pytest

from moray.engine.structured.json_schema import prepare, resolve, walk

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
CLOSED = {"additionalProperties": False}
A = {"properties": {"a": {}}}
B = {"properties": {"b": {}}}
DEFS = {"$defs": {"A": A}}
CLOSED_DEFS = {"$defs": {"A": A | CLOSED}}


@pytest.mark.parametrize(
    ("schema", "prepared"),
    [
        (A, A | CLOSED),
        ({"items": A}, {"items": A | CLOSED}),
        ({"prefixItems": [A, True]}, {"prefixItems": [A | CLOSED, True]}),
        ({"properties": {"x/y": A}}, {"properties": {"x/y": A | CLOSED}} | CLOSED),
        ({"additionalProperties": A}, {"additionalProperties": A | CLOSED}),
        # Those that say what other keys there may be, and that need one.
        (A | {"additionalProperties": True}, A | {"additionalProperties": True}),
        (A | {"patternProperties": {"^x": {}}}, A | {"patternProperties": {"^x": {}}}),
        (A | {"required": ["a", "b"]}, A | {"required": ["a", "b"]}),
        ({"type": "object"}, {"type": "object"}),
        # Other schemas that describe the same object.
        ({"allOf": [A, B]}, {"allOf": [A, B]}),
        ({"oneOf": [A, B]}, {"oneOf": [A, B]}),
        ({"allOf": [{"properties": {"c": A}}]}, {"allOf": [{"properties": {"c": A}}]}),
        (A | {"anyOf": [B, {"required": ["a"]}]}, A | {"anyOf": [B, {"required": ["a"]}]}),
        ({"anyOf": [A, B], "title": "either"}, {"anyOf": [A | CLOSED, B | CLOSED], "title": "either"}),
        ({"type": "object", "anyOf": [A]}, {"type": "object", "anyOf": [A | CLOSED]}),
        (
            {"anyOf": [{"properties": {"c": {"oneOf": [A]}}}]},
            {"anyOf": [{"properties": {"c": {"oneOf": [A]}}} | CLOSED]},
        ),
        # References.
        ({"$ref": "#/%24defs/A"} | DEFS, {"$ref": "#/%24defs/A"} | CLOSED_DEFS),
        (
            {"items": {"$ref": "#/$defs/A"}, "contains": {"allOf": [{"$ref": "#/%24defs/A"}]}} | DEFS,
            {"items": {"$ref": "#/$defs/A"}, "contains": {"allOf": [{"$ref": "#/%24defs/A"}]}} | DEFS,
        ),
        (
            {"items": A | {"$id": "a"}, "contains": {"$ref": "a"}},
            {"items": A | {"$id": "a"}, "contains": {"$ref": "a"}},
        ),
        ({"$ref": "#/$defs/A"} | DEFS, {"$ref": "#/$defs/A"} | CLOSED_DEFS),
        (
            {"items": {"$ref": "#/$defs/A", "title": "t"}} | DEFS,
            {"items": {"$ref": "#/$defs/A", "title": "t"}} | CLOSED_DEFS,
        ),
        ({"allOf": [{"$ref": "#/$defs/A"}, B]} | DEFS, {"allOf": [{"$ref": "#/$defs/A"}, B]} | DEFS),
        ({"$ref": "#/$defs/A", "required": ["b"]} | DEFS, {"$ref": "#/$defs/A", "required": ["b"]} | DEFS),
        (
            {"prefixItems": [{"$ref": "#/$defs/A"}, {"oneOf": [{"$ref": "#/$defs/A"}]}]} | DEFS,
            {"prefixItems": [{"$ref": "#/$defs/A"}, {"oneOf": [{"$ref": "#/$defs/A"}]}]} | DEFS,
        ),
        ({"properties": {"next": {"$ref": "#"}}}, {"properties": {"next": {"$ref": "#"}}} | CLOSED),
        # Values that look like schemas.
        ({"const": A, "enum": [A], "default": B}, {"const": A, "enum": [A], "default": B}),
    ],
)
def test_objects_are_closed_where_nothing_else_describes_them(schema: dict[str, Any], prepared: dict[str, Any]) -> None:
    assert prepare(schema) == prepared | COMPACT


def test_the_order_of_keys_stays() -> None:
    schema = {"required": ["b"], "properties": {"b": {}, "a": {}}, "type": "object"}
    prepared = prepare(schema)
    assert list(prepared)[:3] == list(schema)
    assert list(prepared["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"coerce_one_of": True}, {"whitespace_flexible": False, "coerce_one_of": True}),
        ({"whitespace_flexible": True}, {"whitespace_flexible": True}),
        ({"whitespace_pattern": "[ ]?"}, {"whitespace_pattern": "[ ]?"}),
    ],
)
def test_white_space_is_the_schemas_own_if_it_says_so(given: dict[str, Any], used: dict[str, Any]) -> None:
    assert prepare({"x-guidance": given}) == {"x-guidance": used}


def test_the_given_schema_is_not_changed() -> None:
    schema = {"properties": {"a": {"properties": {"b": {}}}}}
    prepare(schema)
    assert schema == {"properties": {"a": {"properties": {"b": {}}}}}
    assert prepare(True) is True


def test_places_are_json_pointers() -> None:
    schema = {"properties": {"a/b": {"items": [{}, True]}}, "$defs": {"c~": {}}}
    places = dict(walk(schema))
    assert set(places) == {"", "/properties/a~1b", "/properties/a~1b/items/0", "/properties/a~1b/items/1", "/$defs/c~0"}
    for pointer, inner in places.items():
        assert resolve(schema, f"#{pointer}") == (pointer, inner)
    assert (
        resolve(schema, "#/$defs/d") is resolve(schema, "https://example.org/#/$defs/c") is resolve(schema, 3) is None
    )
