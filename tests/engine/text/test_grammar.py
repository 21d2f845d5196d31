"""Grammars: what is compiled, kept and refused, and that what a matcher allows obeys."""

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import write_sentencepiece

from moray.engine.errors import RequestError
from moray.engine.structured.constraint import MAX_COMPILED, Kind, Structured
from moray.engine.text import grammar
from moray.engine.text.grammar import Grammars, Matcher, words_of
from moray.engine.text.tokenizer import Tokenizer

KINDS = ("byte_level", "sentencepiece", "metaspace")
VOCAB = 512  # more than the tokenizers have, as in checkpoints whose embeddings are padded


@pytest.fixture(scope="module")
def grammars(tokenizers: dict[str, Tokenizer]) -> dict[str, Grammars]:
    return {kind: Grammars(tokenizers[kind], VOCAB, tokenizers[kind].stop_token_ids) for kind in KINDS}


def choice(*texts: str) -> Structured:
    return Structured.from_value("choice", texts)


def allowed(matcher: Matcher) -> list[int]:
    words = bytearray(4 * words_of(VOCAB))
    matcher.fill(memoryview(words))
    bits = int.from_bytes(words, "little")
    return [token for token in range(VOCAB) if bits >> token & 1]


def walk(matcher: Matcher, tokenizer: Tokenizer, source: random.Random, max_tokens: int = 400) -> str | None:
    """Return the text of tokens that are drawn from those that are allowed; None if it did not come to an end."""
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        forced, may = list(matcher.forced_tokens()), allowed(matcher)
        assert matcher.error is None and may
        assert forced[:1] == (may if len(may) == 1 and may[0] not in tokenizer.stop_token_ids else [])
        token = source.choice(may)
        if token in tokenizer.stop_token_ids:
            return tokenizer.decode(token_ids)
        matcher.accept(token)
        token_ids.append(token)
        if matcher.has_ended:
            return tokenizer.decode(token_ids)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_gives_one_of_the_texts(
    grammars: dict[str, Grammars], tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    texts = ["yes", "yesterday", "no, never", "日本", "a\nb", '"quoted" \\ / ^$.*']  # in an order, which a set has not
    source = random.Random(0)
    seen: set[str | None] = set()
    for _ in range(5000):  # until each text has come: which tokens may begin one depends on the trained tokenizer
        seen.add(walk(grammars[kind].matcher(choice(*texts)), tokenizers[kind], source))
        if len(seen) == len(texts):
            break
    assert seen == set(texts)


@pytest.mark.parametrize(
    ("structured", "text"),
    [
        (Structured.from_value("regex", r"^\d\w\s?[^\n]$"), r"[0-9][0-9A-Za-z_][ \t\n\r\f\v]?[^\n]"),
        (Structured.from_value("grammar", 'start: "a" b+\nb: /[0-9]/'), "a[0-9]+"),
        (Structured.from_value("grammar", 'root ::= "a" b+\nb ::= [0-9]'), "a[0-9]+"),
    ],
)
def test_a_walk_matches(
    grammars: dict[str, Grammars], tokenizers: dict[str, Tokenizer], structured: Structured, text: str
) -> None:
    for number in range(20):
        found = walk(grammars["byte_level"].matcher(structured), tokenizers["byte_level"], random.Random(number))
        assert found is None or re.fullmatch(text, found)


def test_a_grammar_is_compiled_once_and_the_last_ones_are_kept(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    grammars = Grammars(tokenizer, VOCAB, tokenizer.stop_token_ids)
    compiled: list[Structured] = []
    compile_one = grammars._compile
    grammars._compile = lambda structured: (compiled.append(structured), compile_one(structured))[1]  # type: ignore

    first, second = choice("a"), choice("b")
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(grammars.compile, first) for _ in range(32)]:
            done.result()
    assert compiled == [first]
    grammars.compile(second)
    for number in range(MAX_COMPILED - 1):
        grammars.compile(choice(str(number)))
        grammars.matcher(first)
    assert compiled.count(first) == 1
    grammars.compile(second)
    assert compiled.count(second) == 2, "it was used last before all others"


def test_what_was_checked_is_not_checked_again(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Structured] = []
    monkeypatch.setattr(Structured, "check", checked.append)
    tokenizer = tokenizers["byte_level"]
    Grammars(tokenizer, VOCAB, tokenizer.stop_token_ids).compile(choice("a"))
    assert checked == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", {"properties": {"a": {"not": {}}}}),
        ("json_schema", False),
        ("regex", r"\d(b"),
        ("regex", r"\bfoo"),
        ("grammar", "start: other"),
        ("grammar", "root ::= [a"),
    ],
)
def test_what_was_not_checked_is_refused_in_the_words_of_the_check(
    grammars: dict[str, Grammars], kind: Kind, value: object
) -> None:
    structured = Structured.from_value(kind, value)
    with pytest.raises(RequestError) as checked:
        structured.check()
    with pytest.raises(RequestError) as compiled:
        grammars["byte_level"].compile(structured)
    assert (compiled.value.code, compiled.value.message) == (checked.value.code, checked.value.message)


def test_what_is_compiled_is_known_until_others_push_it_out(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    grammars = Grammars(tokenizer, VOCAB, tokenizer.stop_token_ids)
    wrong = Structured("grammar", "start: other")
    with pytest.raises(RequestError):
        grammars.compile(wrong)
    assert not grammars.is_compiled(wrong), "its refusal is kept, not the grammar"
    first, second = choice("a"), choice("b")
    assert not grammars.is_compiled(first)
    for structured in (first, second, *(choice(str(number)) for number in range(MAX_COMPILED - 2))):
        grammars.compile(structured)
    assert grammars.is_compiled(first), "and is used last now"
    grammars.compile(choice("c"))
    assert grammars.is_compiled(first) and not grammars.is_compiled(second)


def test_matchers_share_nothing(grammars: dict[str, Grammars]) -> None:
    one, other = (grammars["byte_level"].matcher(choice("ab", "cd")) for _ in range(2))
    before = allowed(one)
    one.accept(before[0])
    assert allowed(other) == before != allowed(one)


def test_what_may_not_come_is_an_error_that_stays(grammars: dict[str, Grammars]) -> None:
    matcher = grammars["byte_level"].matcher(choice("ab", "cd"))
    wrong = next(token for token in range(100) if token not in allowed(matcher))
    matcher.accept(wrong)
    assert matcher.error is not None and "\n" not in matcher.error
    assert not matcher.has_ended and not matcher.forced_tokens()
    first = matcher.error
    allowed(matcher)
    assert matcher.error == first


@pytest.mark.parametrize(
    "structured",
    [
        Structured("grammar", 'start: "a" ("b0"' + "".join(f' | "b{i}"' for i in range(1, 2500)) + ")"),
        Structured.from_value("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1200)}}),
    ],
    ids=["grammar", "properties"],
)
def test_what_is_too_complex_at_its_first_choice_is_found_before_it_runs(
    grammars: dict[str, Grammars], structured: Structured
) -> None:
    with pytest.raises(RequestError, match=r"row has \d+ items; max is 2000") as caught:
        grammars["byte_level"].compile(structured)
    assert caught.value.code == "bad_grammar"


@pytest.mark.parametrize("structured", [Structured.from_value("regex", "()"), Structured("grammar", 'start: ""')])
def test_it_must_allow_a_text(grammars: dict[str, Grammars], structured: Structured) -> None:
    for _ in range(2):  # the refusal is kept as well
        with pytest.raises(RequestError, match="no text but the empty one") as caught:
            grammars["byte_level"].matcher(structured)
        assert (caught.value.code, caught.value.field) == ("bad_grammar", "structured")


def test_models_without_what_it_needs(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the model folder has none") as caught:
        Grammars(None, VOCAB, [0]).compile(choice("a"))
    assert caught.value.code == "no_tokenizer"
    with pytest.raises(RequestError, match="a token that ends a text") as caught:
        Grammars(tokenizers["byte_level"], VOCAB, []).compile(choice("a"))
    assert caught.value.code == "no_grammar_tokenizer"
    slow = Tokenizer(write_sentencepiece(tmp_path))
    slow._backend = None
    with pytest.raises(RequestError, match="a fast tokenizer") as caught:
        Grammars(slow, VOCAB, [0]).compile(choice("a"))
    assert caught.value.code == "no_grammar_tokenizer"


def test_a_tokenizer_that_llguidance_reads_otherwise_is_refused(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_with_spaces", lambda text: text)
    tokenizer = tokenizers["metaspace"]
    with pytest.raises(RequestError, match=r"for llguidance token \d+ is b'.*', and it is b' .*'") as caught:
        Grammars(tokenizer, VOCAB, tokenizer.stop_token_ids).compile(choice("a"))
    assert caught.value.code == "no_grammar_tokenizer"


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-9, 99), st.integers(0, 30)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    st.lists(st.sampled_from(["a", 'b"', 3, -1, None, True, "日"]), min_size=1, max_size=3, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["x\n", {"k": [1]}, 7]).map(lambda value: {"const": value}),
    st.just({"type": "string", "format": "date"}),
)  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def make(properties: dict[str, Any], required: int) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties)[:required]}

    return st.builds(
        make, st.dictionaries(st.sampled_from(["a", "b c", '"', "é"]), inner, max_size=3), st.integers(0, 3)
    )


def referred(schema: Any) -> dict[str, Any]:
    """Return the schema of an object that has the schema twice, by references."""
    twice = {"x": {"$ref": "#/$defs/d"}, "y": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 1}}
    return {"$defs": {"d": schema}, "type": "object", "properties": twice}


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(inner, st.integers(0, 2)).map(lambda of: {"type": "array", "items": of[0], "maxItems": of[1]})
    unions = st.lists(inner, min_size=1, max_size=2).map(lambda schemas: {"anyOf": schemas})
    return st.one_of(objects(inner), arrays, unions, inner.map(referred))


def without_definitions(schema: Any) -> bool:
    return "$defs" not in json.dumps(schema)


FLAT = SCALARS | containers(SCALARS)
SCHEMAS = FLAT | containers(FLAT.filter(without_definitions))


@pytest.fixture(scope="module", params=KINDS)
def walker(
    request: pytest.FixtureRequest, grammars: dict[str, Grammars], tokenizers: dict[str, Tokenizer]
) -> Iterator[Any]:
    yield lambda structured, source: walk(
        grammars[request.param].matcher(structured), tokenizers[request.param], source
    )


@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_instances_are_valid(walker: Any, schema: dict[str, Any], seed: int) -> None:
    text = walker(Structured.from_value("json_schema", schema), random.Random(seed))
    if text is not None:
        assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)
        assert json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text or "\\" in text
