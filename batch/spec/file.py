"""Read a YAML file of settings."""

from pathlib import Path
from typing import Any

from moray.engine.errors import Problem, SpecError, show
from moray.engine.settings.yaml_text import YamlError, parse_yaml


def read_yaml_file(path: Path) -> dict[Any, Any]:
    """Return the file's values. Raises SpecError where the file is not a YAML mapping."""
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
    return values
