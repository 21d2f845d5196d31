"""The values of a spec: a YAML file with `--set` overrides applied, not yet validated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch.spec.yaml_text import YamlError, parse_yaml
from engine.errors import Problem, SpecError, show


def read_values(path: Path, overrides: Sequence[str]) -> tuple[dict[Any, Any], list[Problem]]:
    """What the file says after the overrides, and what is wrong with the overrides.

    Raises SpecError where the file is not a YAML mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except YamlError as error:
        raise SpecError([Problem(f"{path}:{error.line}", error.message)]) from None
    except UnicodeDecodeError:
        raise SpecError([Problem(str(path), "is not UTF-8 text")]) from None
    except OSError as error:
        raise SpecError([Problem(str(path), f"cannot be read: {error.strerror}")]) from None
    if not isinstance(values, dict):
        raise SpecError([Problem(str(path), f"must be a mapping with keys (model, input, ...), is {show(values)}")])
    return values, [problem for override in overrides for problem in _apply(values, override)]


def _apply(values: dict[Any, Any], override: str) -> list[Problem]:
    """Set one `a.b=value` in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return [Problem("--set", f"must be key=value, such as sampling.temperature=0.7, is {override!r}")]
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
