"""Grammars: compiles what completions must obey for one tokenizer, and follows them token by token.

This is the one place that makes llguidance's matchers. A matcher never raises: a mistake puts it into an error state,
in which it allows the end of the text alone. So every call here checks that state.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING

from moray.engine.errors import RequestError
from moray.engine.structured.constraint import MAX_COMPILED, Structured
from moray.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # importing it takes a tenth of a second, which only those who use it should wait
    from llguidance import LLMatcher, LLTokenizer

WORD_BYTES = 4
NUM_CHECKED = 500  # tokens whose bytes are compared
MAX_DIFFERENT = 0.02  # share of them that may differ: single bytes such as 0xFF, and names of added tokens


def words_of(vocab_size: int) -> int:
    """Return the number of 32-bit words that have a bit for each token of a vocabulary."""
    return -(-vocab_size // (8 * WORD_BYTES))


class Matcher:
    """Follows one completion through its grammar.

    error: why it cannot be followed any further; None while it can
    """

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self.error: str | None = None

    def fill(self, words: memoryview) -> None:
        """Write the tokens that may come next into a mask; where the grammar cannot be followed, there is an error.

        words: bytes of the mask, whose bit i % 32 of the 32-bit word i / 32 is token i
        """
        mask = self._matcher.compute_bitmask()
        words[: len(mask)] = mask[: len(words)]
        self._check()

    def accept(self, token_id: int) -> None:
        """Take the token that came next; where it may not come, there is an error."""
        self._matcher.consume_token(token_id)
        self._check()

    def forced_tokens(self) -> Sequence[int]:
        """Return the tokens that must come next, as far as there is no choice. They are not taken."""
        return () if self.has_ended or self.error is not None else self._matcher.compute_ff_tokens()

    def ends_after(self, token_ids: Sequence[int]) -> bool:
        """Return whether no token may come after these but one that ends the text. They are not taken."""
        ahead = self._matcher.deep_copy()
        ahead.consume_tokens(list(token_ids))
        return ahead.is_stopped()

    @property
    def has_ended(self) -> bool:
        """Return whether no token may come next but one that ends the text."""
        return self.error is None and self._matcher.is_stopped()

    def _check(self) -> None:
        if self.error is None and self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())


class Grammars:
    """Compiles grammars for one model, each once. All methods may be called from any thread.

    tokenizer:       None = the model has none
    vocab_size:      tokens that the model has logits for
    stop_token_ids:  tokens that end a text
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._compiled: OrderedDict[Structured, Future[LLMatcher | RequestError]] = OrderedDict()  # last used last
        self._lock = Lock()
        self._tokens: LLTokenizer | None = None
        self._tokens_lock = Lock()

    def compile(self, structured: Structured) -> None:
        """Compile what completions must obey, unless that was done; others meanwhile run Python.

        Raises RequestError: "bad_grammar", "no_tokenizer", "no_grammar_tokenizer".
        """
        self._get(structured)

    def is_compiled(self, structured: Structured) -> bool:
        """Return whether compile() has nothing to do. What is asked for is kept as if it had been used."""
        with self._lock:
            future = self._compiled.get(structured)
            if future is None or not future.done() or future.exception() is not None:
                return False
            self._compiled.move_to_end(structured)
            return not isinstance(future.result(), RequestError)

    def matcher(self, structured: Structured) -> Matcher:
        """Return a matcher for one completion. Raises what compile raises."""
        return Matcher(self._get(structured).deep_copy())

    def _get(self, structured: Structured) -> "LLMatcher":
        with self._lock:
            future = self._compiled.get(structured)
            is_first = future is None
            if future is None:
                future = self._compiled[structured] = Future()
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(structured)
        if is_first:
            try:
                future.set_result(self._compile(structured))
            except RequestError as error:
                future.set_result(error)
            except BaseException as error:
                future.set_exception(error)
        result = future.result()
        if isinstance(result, RequestError):
            raise RequestError(result.code, result.message, field="structured")
        return result

    def _compile(self, structured: Structured) -> "LLMatcher":
        """Return a matcher at the beginning of a text. Hosts have checked it, so it is compiled and not checked again.

        One that was not checked is refused in the same words.
        """
        tokens = self._load_tokens()
        try:
            template = _make_matcher(tokens, structured)
            mask = int.from_bytes(template.compute_bitmask(), "little")
            # Many grammars are largest at the first choice. What is too complex there is found before a row runs.
            ahead = template.deep_copy()
            ahead.consume_tokens(ahead.compute_ff_tokens())
            ahead.compute_bitmask()
            if message := template.get_error() or ahead.get_error():
                raise RequestError("bad_grammar", f"{structured.kind}: {_first_line(message)}")
        except (RequestError, ValueError):
            structured.check()
            raise
        if not mask & ~sum(1 << token for token in self._stop_token_ids):
            raise RequestError("bad_grammar", f"{structured.kind} allows no text but the empty one")
        return template

    def _load_tokens(self) -> "LLTokenizer":
        """Return the tokenizer as llguidance has it, which takes a second for a large vocabulary, once."""
        from llguidance import LLTokenizer

        with self._tokens_lock:
            if self._tokens is None:
                if self._tokenizer is None:
                    raise RequestError("no_tokenizer", "structured needs a tokenizer; the model folder has none.")
                if (text := self._tokenizer.to_json()) is None:
                    raise RequestError(
                        "no_grammar_tokenizer",
                        "structured needs a fast tokenizer; the model folder has only a slow one. Convert it with "
                        "transformers: PreTrainedTokenizerFast writes tokenizer.json.",
                    )
                if not self._stop_token_ids:
                    raise RequestError(
                        "no_grammar_tokenizer",
                        "structured needs a token that ends a text; neither config.json nor the tokenizer names one.",
                    )
                size = max(self._vocab_size, self._tokenizer.vocab_size)
                tokens = LLTokenizer(_with_spaces(text), n_vocab=size, eos_token=self._stop_token_ids)
                _check_bytes(tokens, self._tokenizer)
                self._tokens = tokens
            return self._tokens


def _make_matcher(tokens: "LLTokenizer", structured: Structured) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(tokens, structured.to_grammar(), log_level=0, limits=LLParserLimits(verbose_errors=False))


def _with_spaces(text: str) -> str:
    """Return a tokenizer.json in which llguidance finds that ▁ stands for a space: it does not know Metaspace."""
    settings = json.loads(text)
    decoder = settings.get("decoder") or {}
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    if not any(step.get("type") == "Metaspace" for step in steps):
        return text
    others = [step for step in steps if step.get("type") != "Metaspace"]
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    settings["decoder"] = {"type": "Sequence", "decoders": [space, *others, {"type": "Fuse"}]}
    return json.dumps(settings)


def _check_bytes(tokens: "LLTokenizer", tokenizer: Tokenizer) -> None:
    """Raise RequestError where llguidance takes tokens for other bytes than the tokenizer: texts would not obey."""
    ids = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.is_text(token_id)]
    ids = [i for i in ids[:: max(1, len(ids) // NUM_CHECKED)] if not tokens.is_special_token(i)]
    different = [i for i in ids if tokens.decode_bytes([i]) != tokenizer.token_bytes(i)]
    if len(different) > MAX_DIFFERENT * len(ids):
        first = different[0]
        raise RequestError(
            "no_grammar_tokenizer",
            f"structured does not work with this model's tokenizer: for llguidance token {first} is "
            f"{tokens.decode_bytes([first])!r}, and it is {tokenizer.token_bytes(first)!r}.",
        )


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0].strip() if message.strip() else "unknown error"
