"""Encodes the contexts and continuations of a scoring job into token ids."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from moray.batch.stages.block_schemas import Failure
from moray.batch.stages.column_values import TokenIds, check_ids, read_values
from moray.engine.errors import RequestError, show
from moray.engine.text.continuations import encode_continuations
from moray.engine.text.tokenizer import Tokenizer

Encoded = tuple[TokenIds, Sequence[TokenIds]]  # token ids of a context, and of the continuations to score after it


class Continuations:
    """Reads the continuations to score from a column, or takes the same for each row, as the spec says.

    column:      holds one continuation per row, or a list of them
    choices:     continuations of every row, instead of a column
    kind:        kind of the contexts, as InputSpec.kind; with token ids, the continuations are token ids too
    vocab_size:  token ids of the input must be below it
    """

    def __init__(
        self, column: str | None, kind: str, tokenizer: Tokenizer, vocab_size: int, *, choices: Sequence[str] = ()
    ) -> None:
        self._column = column
        self._choices = list(choices)
        self._kind = kind
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def encode(self, contexts: Sequence[Any], table: pa.Table) -> list[Encoded | Failure]:
        """Return the token ids of each row's context and continuations, or a Failure.

        contexts:  one per row: text, or token ids where that is the kind, or a Failure
        table:     the rows, with the column of continuations
        """
        lists: Sequence[list[Any] | Failure] = [self._choices] * table.num_rows
        if self._column is not None:
            lists = [self._as_list(value) for value in read_values(table, self._column)]
        pairs = list(zip(contexts, lists, strict=True))
        good = [(a, b) for a, b in pairs if not isinstance(a, Failure) and not isinstance(b, Failure)]
        encoded = iter(self._check_ids(good) if self._kind == "token_ids" else self._encode_texts(good))
        return [a if isinstance(a, Failure) else b if isinstance(b, Failure) else next(encoded) for a, b in pairs]

    def _as_list(self, value: Any) -> list[Any] | Failure:
        """Return the continuations of a row as a list without nulls, or a Failure."""
        if isinstance(value, Failure):
            return value
        if value is None:
            return Failure("read", "null_input", f"column {self._column!r} is null in this row")
        if not isinstance(value, list | str):
            return self._wrong("", value)
        is_single = isinstance(value, str) or (
            self._kind == "token_ids" and not any(isinstance(v, list) for v in value)
        )
        texts = [value] if is_single and value != [] else list(value)
        if None in texts:
            number = texts.index(None)
            return Failure("read", "null_input", f"entry {number} of column {self._column!r} is null in this row")
        kind = list if self._kind == "token_ids" else str
        for number, text in enumerate(texts):  # JSON may have anything in any row
            if not isinstance(text, kind):
                return self._wrong(f"entry {number} of ", text)
        return texts or Failure("tokenize", "empty_continuation", f"column {self._column!r} is empty in this row")

    def _wrong(self, place: str, value: Any) -> Failure:
        allowed = "a list of token ids" if self._kind == "token_ids" else "text"
        return Failure("read", "bad_value", f"{place}column {self._column!r} must be {allowed}, is {show(value)}")

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
