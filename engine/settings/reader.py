"""Read settings: validate values with their `--set` overrides by a pydantic model, and report every mistake."""

import json
import shlex
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moray.engine.errors import Problem, SettingsError
from moray.engine.settings.overrides import apply_overrides
from moray.engine.settings.problems import explain

M = TypeVar("M", bound=BaseModel)


def read_settings(
    model: type[M],
    values: dict[Any, Any],
    overrides: Sequence[str],
    *,
    example: str,
    error_type: type[SettingsError] = SettingsError,
) -> M:
    """Set the overrides in the values, and return the settings that these describe.

    overrides:  texts such as `a.b=value`, with values in YAML
    example:    a correct override, for messages

    Raises error_type with every mistake.
    """
    problems = apply_overrides(values, overrides, example)
    try:
        settings = model.model_validate(values, strict=True)
    except ValidationError as error:
        found = explain(error.errors(include_url=False), _keys(model))
        raise error_type([*problems, *(_add_hint(problem, overrides) for problem in found)]) from None
    if problems:
        raise error_type(problems)
    return settings


def _keys(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return the keys of each section; those of a key that is not a section are none."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: list(getattr(kind, "model_fields", ())) for name, kind in kinds.items()}


def _add_hint(problem: Problem, overrides: Sequence[str]) -> Problem:
    """Add to a problem how to write the text, where an override has text that YAML reads as a map."""
    for override in overrides:
        dotted, _, text = override.partition("=")
        if dotted == problem.path and "must be text" in problem.message and "is {" in problem.message:
            return Problem(problem.path, f"{problem.message}; {_quoted(dotted, text)}")
    return problem


def _quoted(dotted: str, text: str) -> str:
    """Return how to write text that YAML would read as something else, quoted for a shell."""
    override = f"{dotted}={json.dumps(text, ensure_ascii=False)}"
    return f"for text write --set {shlex.quote(override)}"
