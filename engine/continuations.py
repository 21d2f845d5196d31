"""Where, in tokens, a context ends and a continuation to be scored begins.

As lm-evaluation-harness has it (TemplateLM in lm_eval/api/model.py), so that scores agree with what it would compute:
white space at the end of a context moves to its continuations; context and continuation are encoded as one text, of
which the context takes as many tokens as it has alone; an empty context is the token a sequence begins with.
"""

from collections.abc import Sequence

from engine.errors import RequestError
from engine.tokenizer import Tokenizer, find_mistake

Encoded = tuple[list[int], list[list[int]]]  # of a context and of its continuations


def encode_continuations(
    tokenizer: Tokenizer, contexts: Sequence[str], continuations: Sequence[Sequence[str]], *, is_chat: bool = False
) -> list[Encoded | RequestError]:
    """Token ids of each context and its continuations, or the reason why they cannot be scored.

    is_chat:  contexts are what Tokenizer.render_chat made: their special tokens are in them, and their white space
              stays, since the answer begins where the template ends

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
    """The context alone, then with each continuation behind it."""
    # Tokens begin with their space: `A:` and ` 4` are what a model has seen, `A: ` and `4` are not.
    alone = context if is_chat else context.rstrip()
    return [alone, *(context + text for text in continuations)]


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
