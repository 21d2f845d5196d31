"""The keys of one JSON object, checked as they are read; problems are collected so that all show at once."""

import math
from collections.abc import Mapping
from typing import Any


class JsonOptions:
    """A null counts as absent. A bad value is noted in `problems` and stands in as the least good one.

    spelling:  our name of a key -> the file's, where they differ
    prefix:    stands before the key in messages
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        spelling: Mapping[str, str] | None = None,
        prefix: str = "",
        problems: list[str] | None = None,
    ) -> None:
        self.values = values
        self.spelling = spelling or {}
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def refuse(self, what: str, supported: str) -> None:
        self.problems.append(f"{what}; supported: {supported}")

    def value(self, key: str) -> Any:
        return self.values.get(self.spelling.get(key, key))

    def holds(self, key: str) -> bool:
        """Whether the key is there, null included."""
        return self.spelling.get(key, key) in self.values

    def one_of(self, *keys: str) -> Any:
        """The value under whichever of the keys is there; two that differ are a problem."""
        found = {key: self.value(key) for key in keys if self.value(key) is not None}
        first = next(iter(found.values()), None)
        if any(value != first for value in found.values()):
            self.refuse(" and ".join(self.state(key) for key in found), "one value for both")
        return first

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(self.state(key), f"a whole number, {least} or more")
            return least
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not _is_number(value) or value < 0 or (value == 0 and not zero):
            self.refuse(self.state(key), "a number, 0 or more" if zero else "a number above 0")
            return 1.0
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.value(key)
        if isinstance(value, list) and len(value) == count and all(_is_number(v) and v > 0 for v in value):
            return tuple(map(float, value))
        state = f"{self.prefix}{key} has {len(value)} entries" if isinstance(value, list) else self.state(key)
        self.refuse(state, f"a list of {count} numbers above 0")
        return (1.0,) * count

    def flag(self, key: str) -> bool:
        self.expect(key, True, False)
        return self.value(key) is True

    def expect(self, key: str, *supported: object) -> None:
        """The key must be absent or have one of these values."""
        value = self.value(key)
        if value is not None and not any(
            value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported
        ):
            self.refuse(self.state(key), " or ".join(map(repr, supported)) if supported else "null")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; absent = none."""
        value = self.value(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(ids)
        self.refuse(self.state(key), "a token id or a list of token ids")
        return ()

    def inner(self, key: str) -> "JsonOptions":
        """The object under the key; empty where there is none."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(self.state(key), "an object")
        return JsonOptions(value if isinstance(value, dict) else {}, prefix=f"{key}.", problems=self.problems)

    def state(self, key: str) -> str:
        value, name = self.value(key), self.prefix + self.spelling.get(key, key)
        return f"{name} is missing" if value is None else f"{name} is {_shorten(repr(value))}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
