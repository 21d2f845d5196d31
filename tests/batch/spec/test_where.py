"""Conditions of input.where: what they mean, and that nothing but a comparison can be written."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_jobs import make_spec

from moray.batch.fingerprint import compute_fingerprint
from moray.batch.spec import JobSpec
from moray.batch.spec.where import Column, Predicate, Value, find_columns, parse_where
from moray.engine.errors import SpecError
from moray.engine.settings.reader import read_settings

A, B = Column("a"), Column("b")


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("a == 'x'", Predicate("==", (A, Value("x")))),
        ("a", A),
        ("not a", Predicate("not", (A,))),
        ("-1 < a <= 2.5", Predicate("and", (Predicate("<", (Value(-1), A)), Predicate("<=", (A, Value(2.5)))))),
        ("a in ['x', \"y\"]", Predicate("in", (A, Value(("x", "y"))))),
        ("a not in (1, 2)", Predicate("not", (Predicate("in", (A, Value((1, 2)))),))),
        ("a is null", Predicate("null", (A,))),
        ("a == None", Predicate("null", (A,))),
        ("null != a", Predicate("not", (Predicate("null", (A,)),))),
        (
            "a is not None or b == true",
            Predicate("or", (Predicate("not", (Predicate("null", (A,)),)), Predicate("==", (B, Value(True))))),
        ),
        ("`a b` == '`x`'", Predicate("==", (Column("a b"), Value("`x`")))),
        ("a == b", Predicate("==", (A, B))),
        ("  (a > 1\n and b < 2)  ", Predicate("and", (Predicate(">", (A, Value(1))), Predicate("<", (B, Value(2)))))),
    ],
)
def test_what_conditions_mean(text: str, node: object) -> None:
    assert parse_where(text) == node


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1", "is no condition such as lang == 'en' and score >= 0.5: .*; write == for equal"),
        ("a == ", "is no condition such as"),
        ("len(a) > 1", r"has 'len\(a\)'; allowed are columns, texts, numbers, true, false, null and lists"),
        ("__import__('os').system('x')", "has .* where a comparison is needed"),
        ("a.b == 1", r"has 'a\.b'; allowed are"),
        ("a + 1 == 2", r"has 'a \+ 1'; allowed are"),
        ("a == 1 if b else 2", "where a comparison is needed"),
        ("1 == 2", "compares 1 with 2; a comparison needs a column"),
        ("a in b", r"needs a column before `in` and a list after it"),
        ("a in ['x', null]", "allowed are"),
        ("a == [1]", "compares with a list; use `in`"),
        ("a < null", "in another way than: column is null"),
        ("a is 1", "in another way than: column is null"),
        ("'x'", "where a comparison is needed"),
        ("(a := 1)", "where a comparison is needed"),
        ("[a for a in b]", "where a comparison is needed"),
        ("a == f'{b}'", "allowed are"),
        ("a == 1j", "allowed are"),
        ("(" * 500 + "a" + ")" * 500, "is no condition such as"),
        ("a" * 10_001, "is longer than 10,000 characters"),
    ],
)
def test_what_is_no_condition(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_where(text)


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_a_mistake(text: str) -> None:
    try:
        assert isinstance(find_columns(parse_where(text)), tuple)
    except ValueError as error:
        assert str(error)


def test_columns() -> None:
    assert find_columns(parse_where("b == 1 and (a in [1] or not b is null) and `x y`")) == ("b", "a", "x y")


def test_the_spec_checks_what_it_selects(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}}
    with pytest.raises(SpecError) as error:
        overrides = ["input.where=a = 1", "input.sample=0%", "input.limit=0", "input.sample_seed=-1"]
        read_settings(JobSpec, values, overrides, example="a.b=c", error_type=SpecError)
    share = "must be null, a whole number, 1 or more, or a share of the rows such as 1%, is '0%'"
    assert [line for line in str(error.value).split("\n") if "where" not in line] == [
        f"input.sample: {share}",
        "input.sample_seed: must be a whole number, 0 or more, is -1",
        "input.limit: must be null or a whole number, 1 or more, is 0",
    ]
    assert "write == for equal" in str(error.value)


def test_what_selects_rows_is_in_the_fingerprint(tmp_path: Path) -> None:
    def components(**source: object) -> set[tuple[str, object]]:
        others = compute_fingerprint(make_spec(tmp_path, input=source), {}, {}).others
        return {(name, value) for name, value in others.items() if name.startswith("input.") and value is not None}

    plain = components()
    assert components(sample_seed=5) == plain
    assert components(limit=5) - plain == {("input.limit", 5)}
    assert components(where="a") - plain == {("input.where", "a")}
    assert components(sample="1%", sample_seed=5) - plain == {("input.sample", "1%"), ("input.sample_seed", 5)}
