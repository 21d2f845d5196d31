"""The types of settings: what they take, and the one message that each has."""

from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from moray.engine.settings import types as t
from moray.engine.settings.problems import describe

CASES: list[tuple[Any, list[Any], list[Any], str]] = [
    (t.Text, ["a", " a "], ["", " ", None, 5], "must be text"),
    (t.MaybeText, ["", None], [5, ["a"]], "must be text or null"),
    (t.Column, ["a", None], ["", 5], "must be the name of a column"),
    (t.Paths, ["a", ["a", "b"]], [[], ["a", ""], {"a"}, {"a": 1}, 5], "must be a path or a list of paths"),
    (t.Keep, ["all", ["a", "b"]], ["some", [], ["a", "a"]], "must be all, none or a list of different columns"),
    (t.Labels, [{}, {"a": "b"}], [{"a": 1}, {"": "b"}, ["a"]], "must be a map from node labels to text"),
    (t.Count, [1], [0, True, 1.0, "1", None], "must be a whole number, 1 or more"),
    (t.Whole, [0], [-1, False, 0.0], "must be a whole number, 0 or more"),
    (t.AutoCount, [1, "auto"], [0, "car", None, True], "must be auto or a whole number, 1 or more"),
    (t.MaybeCount, [1, None], [0, "auto"], "must be null or a whole number, 1 or more"),
    (t.Amount, [0, 0.5], [-1, float("nan"), float("inf"), True, "1"], "must be a number, 0 or more"),
    (t.AutoAmount, [0.5, "auto"], [0, None, "x"], "must be auto or a number above 0"),
    (t.MaybeSeconds, [3, None], [0, float("inf"), "auto"], "must be null or a number above 0"),
    (
        t.Size,
        [1, "2GiB", "500 MB"],
        [0, "auto", 2.5, True, "2 gigs"],
        "must be bytes or a size such as 2GiB, more than 0",
    ),
    (t.AutoSize, ["auto", "1KB"], [0, None, "-1B"], "must be auto, bytes or a size such as 2GiB, more than 0"),
]


@pytest.mark.parametrize(("kind", "good", "bad", "message"), CASES, ids=[message for *_, message in CASES])
def test_what_a_type_takes(kind: Any, good: list[Any], bad: list[Any], message: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for value in good:
        adapter.validate_python(value, strict=True)
    for value in bad:
        with pytest.raises(ValidationError) as error:
            adapter.validate_python(value, strict=True)
        (found,) = error.value.errors()
        assert describe(found).startswith(f"{message}, is "), value


def test_values_are_those_of_python() -> None:
    assert TypeAdapter[Any](t.AutoSize).validate_python("1.5GiB", strict=True) == 3 * 2**29
    assert TypeAdapter[Any](t.Paths).validate_python(["a"], strict=True) == ("a",)


def test_a_complete_message_inside_is_kept() -> None:
    def refuse(value: Any) -> Any:
        raise t.wrong("is not for you")

    kind: Any = Annotated[int, BeforeValidator(refuse), t.must("a number")]
    with pytest.raises(ValidationError) as error:
        TypeAdapter(kind).validate_python(5)
    assert describe(error.value.errors()[0]) == "is not for you"
