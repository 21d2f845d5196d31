"""The kinds of values a spec's fields take, each refusing others with what is allowed and what was given."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from batch.spec.problems import wrong
from engine.errors import show

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]iB|[KMGT]?B)?")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")
_UNITS = {"": 1, "B": 1} | {f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}


def must(allowed: str, is_right: Callable[[Any], bool]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not is_right(value):
            raise wrong(f"must be {allowed}, is {show(value)}")
        return value

    return BeforeValidator(check)


def one_of(*allowed: str) -> BeforeValidator:
    return must(f"one of {', '.join(allowed)}", lambda value: isinstance(value, str) and value in allowed)


def is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and is_number(value, least)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_text, value))


def is_set(value: Any) -> bool:
    return is_texts(value) and len(set(value)) == len(value)


def is_share(value: Any) -> bool:
    """A number of rows, or up to 100% of them."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        return float(match[1]) <= 100
    return is_whole(value, 0)


def _read_size(value: Any) -> Any:
    """Bytes of `2GiB`; other values pass."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return value


def _gpus(value: Any) -> Any:
    if is_number(value, 0) and value > 1:
        raise wrong(f"more than one GPU a worker needs tensor parallelism, which moray does not have; is {show(value)}")
    if value != "auto" and not is_number(value, 0):
        raise wrong(f"must be auto or a number from 0 to 1, is {show(value)}")
    return value


def is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(is_text(name) and is_text(wanted) for name, wanted in value.items())


Auto = Literal["auto"]
Gpus = Annotated[float | Auto, BeforeValidator(_gpus)]
Labels = Annotated[dict[str, str], must("a map from node labels to text", is_labels)]
Text = Annotated[str, must("text", is_text)]
Paths = Annotated[str | tuple[str, ...], must("a path or a list of paths", lambda v: is_text(v) or is_texts(v))]
Flag = Annotated[bool, must("true or false", lambda v: isinstance(v, bool))]
Keep = Annotated[
    Literal["all", "none"] | tuple[str, ...],
    must("all, none or a list of different columns", lambda v: v in ("all", "none") or is_set(v)),
]
Column = Annotated[str | None, must("the name of a column", lambda v: v is None or is_text(v))]
MaybeText = Annotated[str | None, must("text or null", lambda v: v is None or isinstance(v, str))]
AutoFlag = Annotated[bool | Auto, must("auto, true or false", lambda v: v == "auto" or isinstance(v, bool))]
AutoSize = Annotated[
    int | Auto,
    must("auto, bytes or a size such as 2GiB, more than 0", lambda v: v == "auto" or is_whole(v, 1)),
    BeforeValidator(_read_size),
]
Share = Annotated[
    int | str | None,
    must("null, a whole number, 0 or more, or a share of the rows such as 0.5%", lambda v: v is None or is_share(v)),
]


def whole(least: int, other: str | None = None) -> BeforeValidator:
    """A whole number of at least `least`; `other` is the word allowed beside it."""
    word = "" if other is None else f"{other} or "
    beside = None if other == "null" else other
    return must(
        f"{word}a whole number, {least} or more",
        lambda v: is_whole(v, least) or (other is not None and v == beside),
    )


def number(above: float, other: str) -> BeforeValidator:
    beside = None if other == "null" else other
    return must(f"{other} or a number above {above:g}", lambda v: (is_number(v, above) and v != above) or v == beside)
