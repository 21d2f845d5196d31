"""Structured: what is accepted, what is refused in which words, and what llguidance gets."""

import json

import pytest

from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.structured.constraint import MAX_BYTES, Kind, Structured

NESTED = '{"items":' * 5000 + "{}" + "}" * 5000


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (
            "json_schema",
            {"type": "object", "properties": {"b": {}, "a": {}}},
            '{"type":"object","properties":{"b":{},"a":{}}}',
        ),
        (
            "json_schema",
            ' {"properties": {"b": {}, "a": {"const": "ä"}}} ',
            '{"properties":{"b":{},"a":{"const":"ä"}}}',
        ),
        ("json_schema", True, "true"),
        ("regex", r"^\d{4}/[a-z]+$", r"^\d{4}/[a-z]+$"),
        ("choice", ["yes", "no, never.", 'a "b"\n/\\'], '["yes","no, never.","a \\"b\\"\\n/\\\\"]'),
        ("grammar", 'start: "a" b\nb: /[0-9]+/', 'start: "a" b\nb: /[0-9]+/'),
        ("grammar", 'root ::= "a" b\nb ::= [0-9]+', 'root ::= "a" b\nb ::= [0-9]+'),
        ("json_object", True, ""),
    ],
)
def test_what_a_user_writes_becomes_a_text(kind: Kind, value: object, text: str) -> None:
    structured = Structured.from_value(kind, value)
    assert structured == Structured(kind, text)
    structured.check()
    SamplingParams(structured=structured)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", 3, "json_schema must be an object, true or false, is 3"),
        ("json_schema", "[1]", r"json_schema must be an object, true or false, is \[1\]"),
        ("json_schema", "{", "json_schema is not JSON: .* line 1 column 2"),
        ("json_schema", '{"a": 1, "a": 2}', "the key 'a' twice"),
        ("json_schema", {"properties": {1: {}}}, "the key 1, which must be text; quote it"),
        ("json_schema", {"maximum": float("inf")}, "not JSON"),
        ("json_schema", {"enum": [object]}, "not JSON"),
        ("json_schema", NESTED, "nested too deeply"),
        ("json_schema", {"const": "x" * MAX_BYTES}, "at most 262,144 are allowed"),
        ("json_schema", {"x-guidance": {"lenient": True}}, "x-guidance.lenient is not supported"),
        ("json_schema", {"items": {"x-guidance": {}}}, "x-guidance at /items has no effect there"),
        ("regex", ["a"], r"regex must be text, is \['a'\]"),
        ("regex", "", "regex is empty"),
        ("regex", "\ud800", "regex is not valid Unicode at character 0"),
        ("choice", "yes", "choice must be a list of texts, is 'yes'"),
        ("choice", ["a", True], "choice must be a list of texts"),
        ("choice", [], "choice is empty"),
        ("choice", ["a", ""], "choice has an empty text"),
        ("choice", ["a", "b", "a"], "choice has 'a' twice"),
        ("grammar", "", "grammar is empty"),
        ("grammar", "root ::= " + "x" * 20_000, "20,009 bytes of GBNF; at most 16,384 are allowed. Lark's syntax"),
        ("json_object", False, "json_object must be true, is false"),
    ],
)
def test_what_breaks_our_own_rules(kind: Kind, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        Structured.from_value(kind, value)
    assert (caught.value.code, caught.value.field) == ("bad_grammar", "structured")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"not": {}}, r'^json_schema: Unimplemented keys: \["not"\]$'),
        (
            "json_schema",
            {"properties": {"a/b": {"items": {"$ref": "#/$defs/x"}}}, "$defs": {"x": {"anyOf": [{}, {"not": {}}]}}},
            r'^json_schema at /\$defs/x/anyOf/1: Unimplemented keys: \["not"\]$',
        ),
        (
            "json_schema",
            {"properties": {"a": {"type": "string"}, "b": {"pattern": "a(?=b)", "type": "string"}}},
            r"^json_schema at /properties/b: look-around.*, is not supported at character 2 of the regex a\(\?=b\)$",
        ),
        ("json_schema", {"items": {"$ref": "#/$defs/x"}}, "Pointer '/\\$defs/x' does not exist$"),
        ("json_schema", False, "Unsatisfiable schema"),
        ("regex", r"\d(b", "^regex at character 3: unclosed group$"),
        ("regex", r"(a)\1", "^regex at character 4: backreferences are not supported$"),
        ("regex", r"\bfoo", "^regex: lookarounds not supported yet"),
        ("grammar", "start: other", '^grammar at line 1, column 8: unknown name: "other"$'),
        ("grammar", 'start: "a"\nb: "c', "^grammar at line 2, column 6: lexer error$"),
        ("grammar", "start: /a(b/", r"^grammar at line 1, column 8: unclosed group at character 2 of the regex a\(b$"),
        ("grammar", "root ::= [a", "not GBNF: Unexpected end of input at line 1"),
        ("grammar", "root ::= other", "not GBNF: Rule 'other' not found"),
    ],
)
def test_what_llguidance_refuses(kind: Kind, value: object, message: str) -> None:
    structured = Structured.from_value(kind, value)
    with pytest.raises(RequestError, match=message) as caught:
        structured.check()
    assert caught.value.code == "bad_grammar"


def test_a_text_that_was_not_made_from_a_value_is_checked_too() -> None:
    for kind, text, message in (
        ("choice", json.dumps(["a", "a"]), "twice"),
        ("json_schema", '{"x-guidance":{"lenient":true}}', "lenient is not supported"),
        ("json_schema", "{", "not JSON"),
    ):
        with pytest.raises(RequestError, match=message):
            Structured(kind, text)


def test_it_cannot_ignore_the_end() -> None:
    structured = Structured.from_value("json_object", True)
    with pytest.raises(RequestError, match="ignore_eos: must be false with structured"):
        SamplingParams(structured=structured, ignore_eos=True)
