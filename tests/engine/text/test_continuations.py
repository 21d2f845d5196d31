"""Tests of where a continuation begins, in tokens."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from moray.engine.errors import RequestError
from moray.engine.text.continuations import Encoded, encode_continuations
from moray.engine.text.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, context: str, *texts: str, is_chat: bool = False) -> Encoded:
    (result,) = encode_continuations(tokenizer, [context], [texts], is_chat=is_chat)
    assert not isinstance(result, RequestError), result
    return result


def mistake(tokenizer: Tokenizer, context: object, texts: Sequence[object]) -> tuple[str, str]:
    (result,) = encode_continuations(tokenizer, [context], [texts])  # type: ignore[list-item]
    assert isinstance(result, RequestError), result
    return result.code, result.message


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_context_and_continuation_make_the_whole_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    context, (fox, world) = encode(tokenizer, "The quick brown", " fox jumps", " world")
    assert context == tokenizer.encode_prompt("The quick brown")
    assert context + fox == tokenizer.encode_prompt("The quick brown fox jumps")
    assert context + world == tokenizer.encode_prompt("The quick brown world")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
@pytest.mark.parametrize("space", [" ", "  ", "\n", " \n\t "])
def test_space_at_the_end_of_a_context_belongs_to_the_continuation(
    tokenizers: dict[str, Tokenizer], kind: str, space: str
) -> None:
    tokenizer = tokenizers[kind]
    assert encode(tokenizer, f"Hello{space}", "world") == encode(tokenizer, "Hello", f"{space}world")


def test_the_cut_is_at_the_number_of_tokens_that_the_context_has_alone(tokenizers: dict[str, Tokenizer]) -> None:
    """The tokens of the whole text do not begin with the context's: `qu` and `ick` instead of `q` and `uick`."""
    tokenizer = tokenizers["byte_level"]
    alone, whole = tokenizer.encode_prompt("The q"), tokenizer.encode_prompt("The quick")
    assert whole[: len(alone)] != alone
    assert mistake(tokenizer, "The q", ["uick"]) == (
        "empty_continuation",
        "continuation 0 adds no token to its context",
    )
    context, (rest,) = encode(tokenizer, "The q", "uick brown")
    assert (context, rest) == (alone, tokenizer.encode_prompt("The quick brown")[len(alone) :])


def test_an_empty_context_is_the_token_a_sequence_begins_with(
    tokenizers: dict[str, Tokenizer], tokenizer_folders: dict[str, Path]
) -> None:
    byte_level, sentencepiece = tokenizers["byte_level"], tokenizers["sentencepiece"]
    end = byte_level.stop_token_ids[0]  # <|endoftext|> is its beginning and its end
    for context in ("", " "):
        assert encode(byte_level, context, "Hello") == ([end], [byte_level.encode_prompt(f"{context}Hello")])
    begin, hello = 1, sentencepiece.encode_prompt("Hello")
    assert encode(sentencepiece, "", "Hello") == ([begin], [hello[1:]]) and hello[0] == begin
    nameless = Tokenizer(tokenizer_folders["byte_level"])
    nameless.first_id = None
    assert mistake(nameless, "", ["Hello"])[0] == "empty_prompt"


def test_a_chat_keeps_its_space_and_has_no_special_tokens_put_before_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.render_chat(messages)
    context, (answer,) = encode(tokenizer, text, "world", is_chat=True)
    assert context == tokenizer.encode_chat(messages)
    assert tokenizer.decode(answer).strip() == "world"
    spaced, _ = encode(tokenizer, f"{text}\n", "world", is_chat=True)
    assert spaced == tokenizer.encode_texts([f"{text}\n"], add_special_tokens=False)[0] != context


def test_mistakes_stand_where_they_belong(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    assert mistake(tokenizer, None, ["a"]) == ("bad_prompt", "the prompt must be text, is null")
    assert mistake(tokenizer, "a", ["b", None]) == ("bad_prompt", "continuation 1 must be text, is null")
    assert mistake(tokenizer, "a", ["b", "\ud83d"])[1] == "continuation 1 is not valid Unicode at character 0"
    assert mistake(tokenizer, "a ", ["b", ""]) == ("empty_continuation", "continuation 1 is empty")
    results = encode_continuations(tokenizer, ["Hello", "a", "The"], [[" world", " text"], [""], [" fox"]])
    assert [isinstance(result, RequestError) for result in results] == [False, True, False]
    assert results[0] == encode(tokenizer, "Hello", " world", " text")
    assert results[2] == encode(tokenizer, "The", " fox")
    assert encode_continuations(tokenizer, [], []) == []
