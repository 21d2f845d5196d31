"""From the columns of a row to the token ids of its prompt, or the reason why there are none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batch.spec import JobSpec
from batch.spec.template import PromptTemplate
from batch.stages.rows import Failure
from engine.errors import CheckpointError, RequestError
from engine.tokenizer import Tokenizer

TokenIds = Sequence[int]


class Prompts:
    """The spec's way from input columns to token ids.

    vocab_size:  token ids of the input must be below it
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises CheckpointError where the job is about chats and the model has no chat template."""
        self._column = spec.input.column
        self._template = None if spec.template.prompt is None else PromptTemplate(spec.template.prompt)
        self._system = spec.template.system
        self._chat = None if spec.template.chat == "auto" else spec.template.chat
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        encoders: dict[str, Callable[[list[Any]], list[TokenIds | Failure]]] = {
            "prompt": self._encode_prompts,
            "messages": self._encode_chats,
            "token_ids": self._check_ids,
        }
        self._encode = encoders[spec.input.kind]
        if spec.input.kind == "messages":
            _check_has_template(tokenizer, self._chat)

    def token_ids(self, table: pa.Table) -> list[TokenIds | Failure]:
        """One entry a row. The table has the columns that the spec reads."""
        read = self._inputs(table) if self._template is None else self._texts(table, self._template)
        encoded = iter(self._encode([value for value in read if not isinstance(value, Failure)]))
        return [value if isinstance(value, Failure) else next(encoded) for value in read]

    def _inputs(self, table: pa.Table) -> list[Any]:
        null = Failure("read", "null_input", f"column {self._column!r} is null in this row")
        return [null if value is None else value for value in read_values(table, self._column)]

    def _texts(self, table: pa.Table, template: PromptTemplate) -> list[str | Failure]:
        """The prompts that the template makes of its columns."""
        columns = [read_values(table, name) for name in template.columns]
        return [_render(template, dict(zip(template.columns, row, strict=True))) for row in zip(*columns, strict=True)]

    def _encode_prompts(self, texts: list[str]) -> list[TokenIds | Failure]:
        return [_or_failure("tokenize", ids) for ids in self._tokenizer.encode_prompts(texts)]

    def _encode_chats(self, chats: list[list[Mapping[str, Any]]]) -> list[TokenIds | Failure]:
        encoded = self._tokenizer.encode_chats([self._with_system(chat) for chat in chats], self._chat)
        return [_or_failure("template", ids) for ids in encoded]

    def _with_system(self, chat: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation with the job's system message, where it has none; without the struct's empty fields."""
        messages: list[Mapping[str, Any]] = [
            {name: value for name, value in (message or {}).items() if value is not None} for message in chat
        ]
        if self._system is not None and not (messages and messages[0].get("role") == "system"):
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def _check_ids(self, rows: list[list[int | None]]) -> list[TokenIds | Failure]:
        return [self._check_row(row) for row in rows]

    def _check_row(self, row: list[int | None]) -> TokenIds | Failure:
        for index, token_id in enumerate(row):
            if token_id is None or not 0 <= token_id < self._vocab_size:
                found = "null" if token_id is None else token_id
                message = f"token id {index} is {found}; this model's go from 0 to {self._vocab_size - 1}"
                return Failure("tokenize", "bad_token_id", message)
        return [token_id for token_id in row if token_id is not None] or Failure(
            "tokenize", "empty_prompt", "the prompt is empty: no token is in it"
        )


def read_values(table: pa.Table, name: str) -> list[Any]:
    """A column as Python values, with a Failure for text that is not UTF-8: Parquet does not rule it out."""
    column = table.column(name)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_read_value(cell, name) for cell in column]


def _read_value(cell: "pa.Scalar[Any]", name: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Failure("read", "bad_utf8", f"column {name!r} is not valid UTF-8: {error}")


def _render(template: PromptTemplate, row: Mapping[str, Any]) -> str | Failure:
    if failed := [value for value in row.values() if isinstance(value, Failure)]:
        return failed[0]
    try:
        return template.render(row)
    except ValueError as error:
        return Failure("template", "null_column", str(error))


def _or_failure(stage: str, ids: list[int] | RequestError) -> TokenIds | Failure:
    if not isinstance(ids, RequestError):
        return ids
    return Failure("tokenize" if ids.code == "empty_prompt" else stage, ids.code, ids.message)


def _check_has_template(tokenizer: Tokenizer, chat_template: str | None) -> None:
    try:
        tokenizer.render_chat([{"role": "user", "content": "?"}], chat_template)
    except RequestError as error:
        if error.code == "no_chat_template":
            raise CheckpointError(f"input.messages: {error.message}; or give template.chat") from None
