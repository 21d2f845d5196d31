"""Convert pydantic's errors to messages with the value, what is allowed and the nearest known key.

It reads the errors as plain data, so this module does not need pydantic.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from moray.engine.errors import Problem, show

# Types of our own errors: the message of PLAIN is complete, that of SHAPE is what the value must be.
PLAIN, SHAPE = "plain", "shape"

# The first word of the type of a pydantic error -> what the value must be.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
}
_BOUNDS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "{} or less"),
}


def describe(error: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, as a phrase that follows the value's name."""
    kind = str(error["type"])
    if kind == PLAIN:
        return str(error["msg"])
    if kind == "missing":
        return "is required"
    given = show(error["input"])
    if kind == SHAPE:
        return f"must be {error['msg']}, is {given}"
    if kind == "too_short":
        return f"must not be empty, is {given}"
    if kind == "literal_error":
        return f"must be {error['ctx']['expected']}, is {given}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words.format(error['ctx'][bound])}, is {given}"
    if word := _KINDS.get(kind.partition("_")[0]):
        return f"must be {word}, is {given}"
    return f"is not a value that this takes: {given}"


def explain(errors: Iterable[Mapping[str, Any]], keys: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Return a Problem for each error of settings.

    keys: section -> its keys; top-level keys that are not sections have none
    """
    problems = []
    for error in errors:
        path = [str(part) for part in error["loc"]]
        match error["type"]:
            case "extra_forbidden" | "invalid_key":
                message = _unknown(path, keys)
            case "model_type" | "model_attributes_type":
                message = f"must be a section with keys ({', '.join(keys[path[0]])}), is {show(error['input'])}"
            case "literal_error":
                words = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
                message = f"must be one of {words}, is {show(error['input'])}"
            case _:
                message = describe(error)
        problems.append(Problem(".".join(path), message))
    return problems


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: `; did you mean 'x'?`, or the known names if none is near."""
    return closest(name, known) or f"; known: {', '.join(known)}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: `; did you mean 'x'?`, or nothing if no known name is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(path: Sequence[str], keys: Mapping[str, Sequence[str]]) -> str:
    """Return a message that suggests the same key in another section, else the nearest key here, else all keys here."""
    *parents, key = path
    siblings = keys[parents[0]] if parents else list(keys)
    elsewhere = [f"{section}.{key}" for section, names in keys.items() if key in names]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]!r}?"
    return f"unknown key{nearest(key, siblings)}"
