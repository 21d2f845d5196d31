"""Apply `--set KEY=VALUE`: one setting from the command line, whose value is YAML as in a job spec."""

from collections.abc import Sequence
from typing import Any

from moray.engine.errors import Problem, show
from moray.engine.settings.yaml_text import YamlError, parse_yaml


def apply_overrides(values: dict[Any, Any], overrides: Sequence[str], example: str) -> list[Problem]:
    """Set each `a.b=value` in place, and return a Problem for each mistake.

    example: a correct override, for messages
    """
    return [problem for override in overrides for problem in _apply(values, override, example)]


def _apply(values: dict[Any, Any], override: str, example: str) -> list[Problem]:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return [Problem("--set", f"must be key=value, such as {example}, is {override!r}")]
    try:
        value = parse_yaml(text)
    except YamlError as error:
        return [Problem(f"--set {dotted}", f"{text!r} is not YAML: {error.message}")]
    section = values
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            return [Problem(f"--set {dotted}", f"{key} is {show(section)}, not a section")]
    section[keys[-1]] = value
    return []
