"""JsonOptions: reads the keys of a JSON object and collects all mistakes in it."""

import math
from collections.abc import Mapping
from typing import Any

from moray.engine.errors import shorten


class JsonOptions:
    """Reads the keys of one JSON object; null counts as absent.

    A bad value is reported in `problems`, and a valid value is returned in its place.

    values:    the object
    spelling:  our name of a key -> the file's name, if they differ
    prefix:    put before the key in messages
    problems:  the list that problems are added to; None = a new one
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
        """Add a problem: `what` is not supported, but `supported` is."""
        self.problems.append(f"{what}; supported: {supported}")

    def value(self, key: str) -> Any:
        """Return the value of a key, or None if it is absent."""
        return self.values.get(self._name(key))

    def holds(self, key: str) -> bool:
        """Return whether the key is present, even as null."""
        return self._name(key) in self.values

    def one_of(self, *keys: str) -> Any:
        """Return the value of whichever of the keys is present; two different values are a problem."""
        found = {key: self.value(key) for key in keys if self.value(key) is not None}
        first = next(iter(found.values()), None)
        if any(value != first for value in found.values()):
            self.refuse(" and ".join(self.describe(key) for key in found), "one value for both")
        return first

    def whole(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """Return a whole number that is at least `minimum`."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(self.describe(key), f"a whole number, {minimum} or more")
            return minimum
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """Return a number above 0, or from 0 on if `zero`."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not _is_number(value) or value < 0 or (value == 0 and not zero):
            self.refuse(self.describe(key), "a number, 0 or more" if zero else "a number above 0")
            return 1.0
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of `count` numbers above 0."""
        value = self.value(key)
        if isinstance(value, list) and len(value) == count and all(_is_number(v) and v > 0 for v in value):
            return tuple(map(float, value))
        description = f"{self.prefix}{key} has {len(value)} entries" if isinstance(value, list) else self.describe(key)
        self.refuse(description, f"a list of {count} numbers above 0")
        return (1.0,) * count

    def flag(self, key: str) -> bool:
        """Return whether the value is true; it may be absent."""
        self.expect(key, True, False)
        return self.value(key) is True

    def expect(self, key: str, *supported: object) -> None:
        """Check that the key is absent or has one of the supported values."""
        value = self.value(key)
        if value is not None and not any(
            value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported
        ):
            self.refuse(self.describe(key), " or ".join(map(repr, supported)) if supported else "null")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return the token ids of a key whose value is one id or a list of ids; () if it is absent."""
        value = self.value(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(ids)
        self.refuse(self.describe(key), "a token id or a list of token ids")
        return ()

    def inner(self, key: str) -> "JsonOptions":
        """Return the options of the object under a key, which are empty if it is absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(self.describe(key), "an object")
        values = value if isinstance(value, dict) else {}
        return JsonOptions(values, prefix=f"{self.prefix}{self._name(key)}.", problems=self.problems)

    def pair(self, key: str) -> tuple[int, int]:
        """Return a list of two whole numbers above 0."""
        match self.value(key):
            case [int(first), int(second)] if first > 0 and second > 0:
                return first, second
        self.refuse(self.describe(key), "a list of 2 whole numbers above 0")
        return 1, 1

    def wholes(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers, 0 or more; () if it is absent."""
        value = self.value(key)
        if value is None:
            return ()
        if isinstance(value, list) and all(type(number) is int and number >= 0 for number in value):
            return tuple(value)
        self.refuse(self.describe(key), "a list of whole numbers, 0 or more")
        return ()

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; () if it is absent."""
        value = self.value(key)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return tuple(value)
        self.refuse(self.describe(key), "a list of strings")
        return ()

    def expect_only(self, *known: str) -> None:
        """Check that all keys but the known ones are null: what is not known may change the arithmetic."""
        for key in self.values:
            if key not in known:
                self.expect(key)

    def describe(self, key: str) -> str:
        """Return the key and its value for a message."""
        value, name = self.value(key), self.prefix + self._name(key)
        return f"{name} is missing" if value is None else f"{name} is {shorten(repr(value))}"

    def _name(self, key: str) -> str:
        return self.spelling.get(key, key)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
