"""From a row's context and the column of its continuations to token ids of both, or the reason why there are none."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batch.stages.cells import TokenIds, check_ids, read_values
from batch.stages.rows import Failure
from engine.continuations import encode_continuations
from engine.errors import RequestError
from engine.tokenizer import Tokenizer

Encoded = tuple[TokenIds, Sequence[TokenIds]]  # of a context and of the continuations to score after it


class Continuations:
    """The spec's way from a column to the continuations that are scored.

    column:      holds one continuation a row, or a list of them
    kind:        of the contexts, as InputSpec.kind; continuations of token ids are token ids
    vocab_size:  token ids of the input must be below it
    """

    def __init__(self, column: str, kind: str, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._column = column
        self._kind = kind
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def encode(self, contexts: Sequence[Any], table: pa.Table) -> list[Encoded | Failure]:
        """One entry a row. contexts: text, or token ids where that is the kind, or a Failure."""
        lists = [self._as_list(value) for value in read_values(table, self._column)]
        pairs = list(zip(contexts, lists, strict=True))
        good = [(a, b) for a, b in pairs if not isinstance(a, Failure) and not isinstance(b, Failure)]
        encoded = iter(self._check_ids(good) if self._kind == "token_ids" else self._encode_texts(good))
        return [a if isinstance(a, Failure) else b if isinstance(b, Failure) else next(encoded) for a, b in pairs]

    def _as_list(self, value: Any) -> list[Any] | Failure:
        """The continuations of a row, none of them null."""
        if isinstance(value, Failure):
            return value
        if value is None:
            return Failure("read", "null_input", f"column {self._column!r} is null in this row")
        is_one = isinstance(value, str) or (self._kind == "token_ids" and not any(isinstance(v, list) for v in value))
        texts = [value] if is_one and value != [] else list(value)
        if None in texts:
            number = texts.index(None)
            return Failure("read", "null_input", f"entry {number} of column {self._column!r} is null in this row")
        return texts or Failure("tokenize", "empty_continuation", f"column {self._column!r} is empty in this row")

    def _encode_texts(self, pairs: Sequence[tuple[str, list[str]]]) -> list[Encoded | Failure]:
        contexts, texts = [context for context, _ in pairs], [texts for _, texts in pairs]
        encoded = encode_continuations(self._tokenizer, contexts, texts, is_chat=self._kind == "messages")
        return [Failure("tokenize", e.code, e.message) if isinstance(e, RequestError) else e for e in encoded]

    def _check_ids(self, pairs: Sequence[tuple[TokenIds, list[list[int | None]]]]) -> list[Encoded | Failure]:
        return [self._check_row(*pair) for pair in pairs]

    def _check_row(self, context: TokenIds, continuations: list[list[int | None]]) -> Encoded | Failure:
        checked: list[TokenIds] = []
        for number, ids in enumerate(continuations):
            found = check_ids(ids, self._vocab_size)
            if isinstance(found, Failure):
                return Failure(found.stage, found.code, f"continuation {number}: {found.message}")
            if not found:
                return Failure("tokenize", "empty_continuation", f"continuation {number} is empty")
            checked.append(found)
        return context, checked
