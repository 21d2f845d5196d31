"""From the columns of a row to the token ids of its prompt and of what is scored after it, or why there are none."""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from batch.spec import JobSpec
from batch.spec.template import PromptTemplate
from batch.stages.cells import TokenIds, check_ids, read_values
from batch.stages.continuations import Continuations, Encoded
from batch.stages.rows import Failure
from engine.errors import CheckpointError, RequestError
from engine.tokenizer import Tokenizer


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
        self._kind = spec.input.kind
        self._continuations: Continuations | None = None
        if spec.input.continuation is not None:
            self._continuations = Continuations(spec.input.continuation, self._kind, tokenizer, vocab_size)
        encoders: dict[str, Callable[[list[Any]], list[TokenIds | Failure]]] = {
            "prompt": self._encode_prompts,
            "messages": self._encode_chats,
            "token_ids": self._check_ids,
        }
        self._encode = encoders[self._kind]
        if self._kind == "messages":
            _check_has_template(tokenizer, self._chat)

    def encode(self, table: pa.Table) -> list[Encoded | Failure]:
        """The prompt and the continuations to score after it, which a job that generates has none of; one entry a row.
        The table has the columns that the spec reads."""
        read = self._inputs(table) if self._template is None else self._texts(table, self._template)
        if self._continuations is not None:
            if self._kind == "messages":
                read = [self._render_chat(value) for value in read]
            elif self._kind == "token_ids":
                read = self._token_ids(read)
            return self._continuations.encode(read, table)
        return [value if isinstance(value, Failure) else (value, ()) for value in self._token_ids(read)]

    def _token_ids(self, read: list[Any]) -> list[TokenIds | Failure]:
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

    def _render_chat(self, chat: Any) -> str | Failure:
        if isinstance(chat, Failure):
            return chat
        try:
            return self._tokenizer.render_chat(self._with_system(chat), self._chat)
        except RequestError as error:
            return Failure("template", error.code, error.message)

    def _with_system(self, chat: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation with the job's system message, where it has none; without the struct's empty fields."""
        messages: list[Mapping[str, Any]] = [
            {name: value for name, value in (message or {}).items() if value is not None} for message in chat
        ]
        if self._system is not None and not (messages and messages[0].get("role") == "system"):
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def _check_ids(self, rows: list[list[int | None]]) -> list[TokenIds | Failure]:
        empty = Failure("tokenize", "empty_prompt", "the prompt is empty: no token is in it")
        return [check_ids(row, self._vocab_size) or empty for row in rows]


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
