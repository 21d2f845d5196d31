"""Prepare a JSON schema for constrained generation: compact JSON, and objects without further keys.

A weak model writes blanks for ever where blanks are allowed, and opens another key for ever where one is allowed. So
JSON is written without white space, and an object that lists its properties gets no others, which still conforms to
the schema as it was given.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any] | bool

GUIDANCE = "x-guidance"  # llguidance's own options, at the top of a schema
MAX_TRIES = 200  # of find_place, a millisecond each
WHITESPACE = ("whitespace_flexible", "whitespace_pattern")
# Where a schema has other schemas: by name, in a list, or one.
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains"),
    *("propertyNames", "not", "if", "then", "else"),
)
# What says nothing about an instance.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$id", "$schema"}
    | {"$defs", "definitions", GUIDANCE}
)
# Keywords whose schemas describe the same instance as their neighbours do: closing one of them would refuse the
# properties of the others.
_SAME_INSTANCE = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "$dynamicRef")


def prepare(schema: Schema) -> Any:
    """Return the schema as llguidance gets it: objects are closed, and JSON is compact unless `x-guidance` says else.

    The order of properties, which is the order in which they are written, stays.
    """
    if isinstance(schema, bool):
        return schema
    closed = _find_closed(schema)
    prepared: dict[str, Any] = _close(schema, "", closed)
    guidance = schema.get(GUIDANCE, {})
    if isinstance(guidance, Mapping) and not any(key in guidance for key in WHITESPACE):
        prepared[GUIDANCE] = {"whitespace_flexible": False, **guidance}
    return prepared


def find_mistake(schema: Schema) -> str | None:
    """Return what is wrong with llguidance's options in a schema, or None: they must be at the top, and strict."""
    if isinstance(schema, bool):
        return None
    guidance = schema.get(GUIDANCE)
    if isinstance(guidance, Mapping) and guidance.get("lenient"):
        return f"{GUIDANCE}.lenient is not supported: it would ignore keywords that cannot be followed; remove them"
    for pointer, inner in walk(schema):
        if pointer and isinstance(inner, Mapping) and GUIDANCE in inner:
            return f"{GUIDANCE} at {pointer} has no effect there; put it at the top of the schema"
    return None


def walk(schema: Schema, pointer: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield a schema and all schemas in it, each with its JSON pointer."""
    yield pointer, schema
    for inner_pointer, inner, _ in _children(schema, pointer):
        yield from walk(inner, inner_pointer)


def children(schema: Schema, pointer: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield the schemas directly in a schema, each with its JSON pointer."""
    for inner_pointer, inner, _ in _children(schema, pointer):
        yield inner_pointer, inner


def find_place(root: Schema, is_wrong: Callable[[Schema], bool]) -> str:
    """Return the pointer of the innermost schema in a wrong one that is wrong by itself, after MAX_TRIES at most.

    is_wrong: tells of a schema, which has the definitions of the whole one, whether it has the same mistake
    """
    if isinstance(root, bool):
        return ""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    pointer, schema, seen, tries = "", root, {""}, 0
    while True:
        inside = [(where, inner) for where, inner, key in _children(schema, pointer) if key not in definitions]
        if (target := resolve(root, schema.get("$ref"))) is not None:
            inside.append(target)
        for where, inner in inside:
            if where in seen or isinstance(inner, bool) or tries == MAX_TRIES:
                continue
            seen.add(where)
            tries += 1
            if is_wrong({**inner, **definitions}):
                pointer, schema = where, inner
                break
        else:
            return pointer


def resolve(root: Schema, reference: object) -> tuple[str, Schema] | None:
    """Return the pointer and the schema of a reference within the document (`#/$defs/name`), or None."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    place: Any = root
    pointer = ""
    for part in reference[2:].split("/") if len(reference) > 1 else ():
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        pointer += f"/{_escape(key)}"
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, Mapping) and key in place:
            place = place[key]
        else:
            return None
    return (pointer, place) if isinstance(place, Mapping | bool) else None


def _children(schema: Schema, pointer: str) -> Iterator[tuple[str, Schema, str]]:
    """Yield the schemas directly in a schema, each with its JSON pointer and the keyword that it belongs to."""
    if isinstance(schema, bool):
        return
    for key, value in schema.items():
        place = f"{pointer}/{_escape(key)}"
        if key in _MAPS and isinstance(value, Mapping):
            entries = [(f"{place}/{_escape(name)}", inner) for name, inner in value.items()]
        elif (key in _LISTS or key == "items") and isinstance(value, list):
            entries = [(f"{place}/{i}", inner) for i, inner in enumerate(value)]
        elif key in _SINGLE:
            entries = [(place, value)]
        else:
            continue
        yield from ((where, inner, key) for where, inner in entries if isinstance(inner, Mapping | bool))


def _find_closed(root: Mapping[str, Any]) -> set[str]:
    """Return the pointers of the objects to close: those that no other schema describes as well.

    A schema that is used in several places, by references, stays open if one of them needs it open. Where references
    are not by JSON pointers, it is not known what they refer to, and nothing is closed.
    """
    alone: set[str] = set()
    shared: set[str] = set()
    todo: list[tuple[str, Schema, bool]] = [("", root, True)]
    while todo:
        pointer, schema, is_alone = todo.pop()
        seen = alone if is_alone else shared
        if pointer in seen or isinstance(schema, bool):
            continue
        if pointer and "$id" in schema:
            return set()
        seen.add(pointer)
        others = {key for key in schema if key not in _ANNOTATIONS} - {"type"}
        for where, inner, key in _children(schema, pointer):
            if key not in ("$defs", "definitions"):  # they count where they are referred to
                todo.append((where, inner, is_alone and (key not in _SAME_INSTANCE or others == {key} == {"anyOf"})))
        if "$ref" in schema:
            target = resolve(root, schema["$ref"])
            if target is None:
                return set()
            todo.append((*target, is_alone and others == {"$ref"}))
    return alone - shared


def _is_open_object(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema lists properties and allows others, which nothing needs."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, Mapping)
        and "additionalProperties" not in schema
        and "patternProperties" not in schema
        and "unevaluatedProperties" not in schema
        and not any(key in schema for key in _SAME_INSTANCE)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
    )


def _close(schema: Any, pointer: str, closed: set[str]) -> Any:
    """Return a copy of a schema, and of those in it, with the objects at `closed` closed."""
    if not isinstance(schema, Mapping):
        return schema
    inner = {where: _close(value, where, closed) for where, value in children(schema, pointer)}
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        place = f"{pointer}/{_escape(key)}"
        if key in _MAPS and isinstance(value, Mapping):
            copy[key] = {name: inner.get(f"{place}/{_escape(name)}", each) for name, each in value.items()}
        elif isinstance(value, list):
            copy[key] = [inner.get(f"{place}/{i}", each) for i, each in enumerate(value)]
        else:
            copy[key] = inner.get(place, value)
    if pointer in closed and _is_open_object(schema):
        copy["additionalProperties"] = False
    return copy


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
