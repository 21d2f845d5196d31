"""From pydantic's errors to Problems a person can act on: path, value, what is allowed, the nearest known key."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from engine.errors import Problem, show


def wrong(message: str) -> PydanticCustomError:
    """The one kind of error that the spec's own checks raise; `message` is shown as it is."""
    return PydanticCustomError("spec", "{message}", {"message": message})


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One Problem for each of pydantic's errors, in the order of the spec."""
    sections = {name: _keys(field.annotation) for name, field in model.model_fields.items()}
    problems = []
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        match item["type"]:
            case "extra_forbidden" | "invalid_key":
                message = _unknown(path, sections)
            case "missing":
                message = "is required"
            case "model_type" | "model_attributes_type":
                message = f"must be a section with keys ({', '.join(sections[path[0]])}), is {show(item['input'])}"
            case "spec":
                message = item["msg"]
            case _:
                message = f"{item['msg']}, is {show(item['input'])}"
        problems.append(Problem(".".join(path), message))
    return problems


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` or what is known, as the end of a message."""
    if close := get_close_matches(name, known, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}"


def _unknown(path: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """The same key in another section, else the nearest key beside it, else all keys beside it."""
    *parents, key = path
    siblings = sections[parents[0]] if parents else list(sections)
    elsewhere = [f"{section}.{key}" for section, keys in sections.items() if key in keys]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]!r}?"
    return f"unknown key{nearest(key, siblings)}"


def _keys(annotation: Any) -> list[str]:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return list(annotation.model_fields) if is_section else []
