"""Word what llguidance says about a grammar with a mistake: in one line, with the place where that is known."""

import re
from collections.abc import Callable

from moray.engine.errors import shorten
from moray.engine.structured.json_schema import Schema, find_place

_REGEX = re.compile(r"regex parse error:\n    (.*)\n    ( *)\^+\nerror: (.*)")
_LARK = re.compile(r"(?:at )?(\d+)\((\d+)\): ")


def describe_schema(schema: Schema, message: str, validate: Callable[[Schema], str | None]) -> str:
    """Return the mistake of a JSON schema. validate: returns llguidance's message about a schema, or None"""
    pointer = find_place(schema, lambda inner: validate(inner) == message)
    place = f"json_schema at {pointer}" if pointer else "json_schema"
    if found := _REGEX.search(message):
        return f"{place}: {found[3]} at character {len(found[2]) + 1} of the regex {shorten(found[1])}"
    return f"{place}: {_first_line(message)}"


def describe_regex(message: str) -> str:
    """Return the mistake of a regular expression."""
    if found := _REGEX.search(message):
        return f"regex at character {len(found[2]) + 1}: {found[3]}"
    return f"regex: {_first_line(message).rpartition('(in regex): ')[2]}"


def describe_grammar(message: str, *, is_gbnf: bool) -> str:
    """Return the mistake of a grammar. is_gbnf: llguidance got a translation, whose lines are not the user's"""
    place = _LARK.match(message)
    words = _first_line(message)[0 if place is None else place.end() :]
    if found := _REGEX.search(message):
        words = f"{found[3]} at character {len(found[2]) + 1} of the regex {shorten(found[1])}"
    where = "" if place is None or is_gbnf else f" at line {place[1]}, column {place[2]}"
    return f"grammar{where}: {words}"


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["unknown mistake"])[0].strip()
