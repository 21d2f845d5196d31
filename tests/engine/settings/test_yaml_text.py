"""YAML text by the rules of version 1.2: what is read as what, mistakes with their lines, and what is written."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.engine.settings.yaml_text import YamlError, dump_yaml, parse_yaml

yaml_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("noyeNf~0x1e-.+: '\n\té")
)


@given(st.recursive(yaml_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab01e. "), inner)))
def test_yaml_round_trip(value: object) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-0", 0),
        ("true", True),
        ("~", None),
        ("", None),
        *((text, text) for text in ("no", "yes", "on", "007", "0x1F", "0b11", "1_000", "12:30", "2024-01-01", "=")),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("{<<: {b: 1}, b: 2}", {"b": 2}),
    ],
)
def test_what_a_text_means(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' appears twice"),
        ("a: 1\nb: [\n", 3, "expected the node content, but found '<stream end>' (while parsing a flow node)"),
        ("a: 1\n---\nb: 2\n", 2, "but found another document (expected a single document in the stream)"),
        ("[" * 5000, 1, "it is nested too deeply"),
        ("\0", 1, "unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_mistakes(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlError) as error:
        parse_yaml(text)
    assert (error.value.line, error.value.message) == (line, message)


def test_text_is_written_so_that_every_version_reads_text() -> None:
    """Job folders hold it: it must not change. Keys keep their order, and text of several lines is a block."""
    value = {"b": ["no", "on", "007", "1e3", "2024-01-01", "null", "é", " a"], "a": "x\ny", "n": 1e-05, "t": True}
    assert dump_yaml(value) == (
        "b:\n- 'no'\n- 'on'\n- '007'\n- '1e3'\n- '2024-01-01'\n- 'null'\n- é\n- ' a'\n"
        "a: |-\n  x\n  y\nn: 1.0e-05\nt: true\n"
    )
