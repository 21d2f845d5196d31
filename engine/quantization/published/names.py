"""Turn the ways in which configs name modules into patterns that match a published name as a whole, and name extras."""

import re

from moray.engine.json_options import JsonOptions

# Stored scales and zero points of activations and of the KV cache, which stay in the model's dtype.
ACTIVATIONS = re.compile(r"\.(input|output|activation|q|k|v|kv|prob)_(scale|zero_point)$")


def regular(pattern: str) -> str:
    """Return the pattern for a regular expression that matches the beginning of a name."""
    return f"(?:{pattern}).*"


def containing(text: str) -> str:
    """Return the pattern for names that contain the text."""
    return f".*{re.escape(text)}.*"


def path(text: str) -> str:
    """Return the pattern for a module named from either end, `gate` or `model.layers.0`, and for what is inside it.

    A `*` stands for any text.
    """
    name = re.escape(text.strip(".")).replace(r"\*", ".*")
    return rf"(?:.*\.)?{name}(?:\..*)?"


def check_patterns(options: JsonOptions, key: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the patterns; those that are no regular expressions are a problem of the key, and are left out."""
    valid = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            options.refuse(f"{options.prefix}{key} has {pattern!r} ({error})", "regular expressions after re:")
        else:
            valid.append(pattern)
    return tuple(valid)
