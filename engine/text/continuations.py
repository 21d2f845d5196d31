"""Encode contexts and continuations, for scoring, such that a context ends and a continuation begins at a token.

The rules are those of lm-evaluation-harness (TemplateLM in lm_eval/api/model.py), so that scores agree with its own:
white space at the end of a context moves to its continuations; context and continuation are encoded as one text, of
which the context has as many tokens as it has alone; an empty context becomes the token that begins a sequence.
"""

from collections.abc import Sequence

from moray.engine.errors import RequestError
from moray.engine.text.tokenizer import Tokenizer, find_mistake

Encoded = tuple[list[int], list[list[int]]]  # token ids of a context and of its continuations


def encode_continuations(
    tokenizer: Tokenizer, contexts: Sequence[str], continuations: Sequence[Sequence[str]], *, is_chat: bool = False
) -> list[Encoded | RequestError]:
    """Return the token ids of each context and its continuations, or the error why they cannot be scored.

    is_chat:  contexts come from Tokenizer.render_chat: they contain their special tokens, and keep their white space,
              because the answer begins where the template ends

    Errors: "bad_prompt" (not text), "empty_prompt", "empty_continuation" (adds no token to the context).
    """
    pairs = list(zip(contexts, continuations, strict=True))
    results: list[Encoded | RequestError | None] = [_find_mistake(*pair) for pair in pairs]
    texts = [_join(*pair, is_chat) for pair, mistake in zip(pairs, results, strict=True) if mistake is None]
    flat = tokenizer.encode_texts([text for group in texts for text in group], add_special_tokens=not is_chat)
    encoded, groups = iter(flat), iter(texts)
    return [mistake or _split([next(encoded) for _ in next(groups)], tokenizer.first_id) for mistake in results]


def _find_mistake(context: str, continuations: Sequence[str]) -> RequestError | None:
    if (mistake := find_mistake(context)) is not None:
        return mistake
    for number, text in enumerate(continuations):
        if text == "":
            return RequestError("empty_continuation", f"continuation {number} is empty")
        if (mistake := find_mistake(text, f"continuation {number}")) is not None:
            return mistake
    return None


def _join(context: str, continuations: Sequence[str], is_chat: bool) -> list[str]:
    """Return the context alone, and the context followed by each continuation."""
    # Tokens include the space before them: a model has seen `A:` and ` 4` in training, but not `A: ` and `4`.
    stripped = context if is_chat else context.rstrip()
    return [stripped, *(context + text for text in continuations)]


def _split(encoded: list[list[int]], first_id: int | None) -> Encoded | RequestError:
    context, *wholes = encoded
    continuations = [whole[len(context) :] for whole in wholes]
    if [] in continuations:
        number = continuations.index([])
        return RequestError("empty_continuation", f"continuation {number} adds no token to its context")
    if context:
        return context, continuations
    if first_id is None:
        return RequestError("empty_prompt", "the context is empty, and the tokenizer has no token to begin with")
    return [first_id], continuations
