"""PromptTemplate: the text of `template.prompt` with `{column}` in it; `{{` and `}}` stand for braces."""

import string
from collections.abc import Mapping
from typing import Any


class PromptTemplate:
    """Makes a prompt from the columns of a row. Raises ValueError where the text is not a template."""

    def __init__(self, text: str) -> None:
        self.parts: list[tuple[str, str | None]] = []
        for literal, name, spec, conversion in string.Formatter().parse(text):
            if name == "":
                raise ValueError("has {} without a column name; write {{}} for braces")
            if name is not None and any(letter in name for letter in ".[{"):
                raise ValueError(f"column {name!r} must be a plain name; write {{{{ and }}}} for braces")
            if spec or conversion:
                raise ValueError(f"column {name!r} must stand alone in its braces; write {{{{ and }}}} for braces")
            self.parts.append((literal, name))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns in the template, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row. Raises ValueError that names a column that is null in this row."""
        text = []
        for literal, name in self.parts:
            text.append(literal)
            if name is not None:
                if row[name] is None:
                    raise ValueError(f"column {name!r} is null in this row")
                text.append(str(row[name]))
        return "".join(text)
