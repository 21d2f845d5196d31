"""Tests of the messages for mistakes in settings: none of them is pydantic's."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moray.engine.errors import show
from moray.engine.settings.problems import closest, describe, explain, nearest


class Inner(BaseModel):
    a: int = 1


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    count: int = 1
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1
    least: Annotated[int, Field(ge=3, lt=9)] = 3
    flag: bool = False
    name: str = ""
    names: list[str] = []
    pair: tuple[int, ...] = ()
    table: dict[str, int] = {}
    some: Annotated[list[int], Field(min_length=1)] = [1]
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    raw: bytes = b""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "5"}, "must be a whole number, is '5'"),
        ({"count": True}, "must be a whole number, is true"),
        ({"count": None}, "must be a whole number, is null"),
        ({"share": "1"}, "must be a number, is '1'"),
        ({"share": float("nan")}, "must be a number, is nan"),
        ({"share": 0}, "must be above 0.0, is 0"),
        ({"share": 2.0}, "must be 1.0 or less, is 2.0"),
        ({"least": 1}, "must be 3 or more, is 1"),
        ({"least": 9}, "must be below 9, is 9"),
        ({"flag": "yes"}, "must be true or false, is 'yes'"),
        ({"name": 7}, "must be text, is 7"),
        ({"names": "a"}, "must be a list, is 'a'"),
        ({"pair": 5}, "must be a list, is 5"),
        ({"table": [1]}, "must be an object, is [1]"),
        ({"some": []}, "must not be empty, is []"),
        ({"kind": "c"}, "must be 'a' or 'b', is 'c'"),
        ({"inner": 5}, "must be an object, is 5"),
        ({"raw": 5}, "is not a value that this takes: 5"),
    ],
)
def test_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Settings.model_validate(values)
    assert describe(error.value.errors()[0]) == message


def test_sections_and_unknown_keys() -> None:
    with pytest.raises(ValidationError) as error:
        Settings.model_validate({"kind": "c", "inner": 5, "nmae": 1, "a": 1, "zzz": 1})
    keys = dict.fromkeys(Settings.model_fields, ()) | {"inner": ("a",)}
    problems = map(str, explain(error.value.errors(), keys))
    assert list(problems) == [
        "kind: must be one of a, b, is 'c'",
        "inner: must be a section with keys (a), is 5",
        "nmae: unknown key; did you mean 'name'?",
        "a: unknown key; did you mean 'inner.a'?",
        f"zzz: unknown key; known: {', '.join(keys)}",
    ]


def test_the_nearest_key() -> None:
    assert (nearest("nam", ["name", "b"]), nearest("x", ["name", "b"])) == (
        "; did you mean 'name'?",
        "; known: name, b",
    )
    assert (closest("nam", ["name"]), closest("x", ["name"])) == ("; did you mean 'name'?", "")


def test_values_that_are_shown() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert (show(("a", 1)), show("x" * 99)[-5:], show(deep)) == ("['a', 1]", "xx...", "nested too deeply to be shown")
