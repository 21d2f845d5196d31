"""Sizes in bytes as users write them: 2GiB, 500 MB, 4096."""

import re
from typing import Any

GIB = 1 << 30
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]iB|[KMGT]?B)?")
_UNITS = {"": 1, "B": 1} | {f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}


def read_size(value: Any) -> Any:
    """Return the bytes of a text such as `2GiB`; return any other value unchanged."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return value
