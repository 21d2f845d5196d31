import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moray.engine.text.stream import Detokenizer, StopAutomaton, TextStream

KINDS = ["byte_level", "sentencepiece", "metaspace"]
PIECES = [
    "Hello",
    " world",
    "  ",
    "\n",
    "é",
    "ß",
    "日本",
    "👩‍👩‍👧",
    "👨‍🚀",
    "🎉",
    "\ufffd",
    "\u0301",
    "\u200d",
    "∀x∈∅",
    "<end>",
]


def some_ids(tokenizer, rng):
    """Return tokens of text, random tokens (invalid UTF-8, specials, ids without a token), truncated text and bytes."""
    num_ids = len(tokenizer._tokenizer) + 5
    byte_ids = sorted(tokenizer.byte_ids) or list(range(2, 258))
    ids = []
    for _ in range(rng.randint(0, 6)):
        kind = rng.randrange(4)
        if kind == 0:
            ids += tokenizer.encode_prompt("".join(rng.choices(PIECES, k=rng.randint(1, 5))))
        elif kind == 1:
            ids += rng.choices(range(num_ids), k=rng.randint(1, 10))
        elif kind == 2:
            whole = tokenizer.encode_prompt(rng.choice(PIECES))
            ids += whole[: rng.randint(1, len(whole))]
        else:
            ids += rng.choices(byte_ids, k=rng.randint(1, 20))
    return ids


def pieces_of(stream, ids):
    """Return the text that each token adds, and the text at the end."""
    return [stream.push(token_id) for token_id in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_the_pieces_are_the_text(tokenizers, kind, seed):
    ids = some_ids(tokenizers[kind], random.Random(seed))
    assert "".join(pieces_of(Detokenizer(tokenizers[kind]), ids)) == tokenizers[kind].decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_no_piece_has_half_a_character(tokenizers, kind, seed):
    # Whatever tokens follow, the text shown so far begins the text of every continuation.
    rng = random.Random(seed)
    ids, more = some_ids(tokenizers[kind], rng), some_ids(tokenizers[kind], rng)
    detokenizer = Detokenizer(tokenizers[kind])
    out = "".join(detokenizer.push(token_id) for token_id in ids)
    assert tokenizers[kind].decode([*ids, *more]).startswith(out)


@pytest.mark.parametrize("kind", KINDS)
def test_valid_text_shows_no_replacement_character(tokenizers, kind):
    ids = tokenizers[kind].encode_prompt("日本 👩‍👩‍👧 ∀ 🎉 é")
    detokenizer = Detokenizer(tokenizers[kind])
    assert all("\ufffd" not in detokenizer.push(token_id) for token_id in ids)


def test_a_character_comes_with_its_last_byte(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode_prompt("∀")
    assert len(ids) == 3
    assert pieces_of(Detokenizer(tokenizer), ids) == ["", "", "∀", ""]
    assert pieces_of(Detokenizer(tokenizer), ids[:2]) == ["", "", "\ufffd"]


def test_spaces_of_sentencepiece(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer.encode_prompt("Hello world")
    special = tokenizer._tokenizer.convert_tokens_to_ids("<|end|>")
    assert "".join(pieces_of(Detokenizer(tokenizer), [special, *ids])) == "Hello world"
    # Only the first space of the whole text is dropped, not that of each piece.
    assert "".join(pieces_of(Detokenizer(tokenizer), [*ids, special, *ids])) == "Hello world Hello world"


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_linear_even_in_invalid_text(tokenizers, kind, monkeypatch):
    tokenizer = tokenizers[kind]
    if tokenizer.byte_ids:
        bad = tokenizer._tokenizer.convert_tokens_to_ids("<0xFF>")
    else:
        bad = next(i for i in range(2, 258) if tokenizer.decode([i, i]) == "\ufffd\ufffd")
    ids = [bad] * 300
    decoded = []
    whole = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or whole(ids))
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == "\ufffd" * 300
    assert sum(decoded) < 25 * len(ids)  # decoding all tokens again at each token would take 150 times as many


STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_complete(text, stops, start=0):
    """Find by a plain search where the text is cut: before the longest of the stop strings that end first."""
    ends = [(text.find(stop, start) + len(stop), -len(stop)) for stop in stops if text.find(stop, start) >= 0]
    return None if not ends else sum(min(ends))


@given(stops=STOPS, text=st.text("abc", max_size=40))
@example(stops=["ab", "b", "aab"], text="caab")
@settings(max_examples=300)
def test_automaton_finds_what_a_search_finds(stops, text):
    automaton = StopAutomaton(stops)
    state, found = 0, None
    for end, character in enumerate(text, 1):
        state = automaton.step(state, character)
        endings = [text[:end][-n:] for n in range(1, 6) if n <= end]
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop) + 1)}
        if found is None:
            assert automaton.depths[state] == max((len(e) for e in endings if e in beginnings), default=0)
            if automaton.matches[state]:
                found = end - automaton.matches[state]
    assert found == first_complete(text, stops)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), min_tokens=st.sampled_from([0, 0, 0, 1, 5]))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_a_search_in_the_text_says(tokenizers, kind, seed, min_tokens):
    tokenizer, rng = tokenizers[kind], random.Random(seed)
    ids = some_ids(tokenizer, rng)
    text = tokenizer.decode(ids)
    stops = [rng.choice(PIECES), "é日"]
    if text:
        start = rng.randrange(len(text))
        stops.append(text[start : start + rng.randint(1, 6)])
    detokenizer = Detokenizer(tokenizer)
    unsearched = sum(len(detokenizer.push(token_id)) for token_id in ids[:min_tokens])
    if len(ids) <= min_tokens:
        unsearched = len(text)
    expected = first_complete(text, stops, unsearched)

    stream = TextStream(tokenizer, tuple(stops), min_tokens)
    shown = ""
    for token_id in [*ids, None]:
        shown += stream.finish() if token_id is None else stream.push(token_id)
        if stream.stopped_at is not None:
            break
        assert text.startswith(shown)
    assert stream.stopped_at == expected
    assert shown == text[:expected]
    assert stream.push(0) == stream.finish() == ""


def test_the_beginning_of_a_stop_string_is_held_back(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = {character: tokenizer.encode_prompt(character)[0] for character in "ENDXab"}
    stream = TextStream(tokenizer, ("END",))
    assert [stream.push(ids[character]) for character in "aENXEENDb"] == ["a", "", "", "ENX", "", "E", "", "", ""]
    assert stream.stopped_at == 5
    stream = TextStream(tokenizer, ("END",))
    assert [stream.push(ids[character]) for character in "aEN"] == ["a", "", ""]
    assert stream.finish() == "EN"
    assert stream.stopped_at is None


def test_a_stop_string_may_be_found_at_the_end(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer._tokenizer.convert_tokens_to_ids(["<0x41>", "<0x42>"])
    stream = TextStream(tokenizer, ("B",))
    assert pieces_of(stream, ids) == ["", "", "A"]
    assert stream.stopped_at == 1
