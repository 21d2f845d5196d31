"""Encodes the input columns of a job into the token ids of its prompts and continuations."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import pyarrow as pa

from moray.batch.input.column_types import INPUT_TYPES
from moray.batch.json_values import json_kinds
from moray.batch.spec import JobSpec
from moray.batch.spec.template import PromptTemplate
from moray.batch.stages.block_schemas import Failure
from moray.batch.stages.chats import ChatReader
from moray.batch.stages.column_values import TokenIds, check_ids, read_values
from moray.batch.stages.continuations import Continuations, Encoded
from moray.engine.errors import CheckpointError, RequestError, show
from moray.engine.text.reasoning import is_open
from moray.engine.text.tokenizer import Tokenizer


class _Chat(NamedTuple):
    """Holds a conversation, and the variables that its template gets."""

    messages: list[Mapping[str, Any]]
    variables: Mapping[str, Any]


class Prompts:
    """Turns input columns into token ids, as the spec says.

    vocab_size:  token ids of the input must be below it
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raise CheckpointError where the job has chats and the model has no chat template."""
        self._column = spec.input.column
        self._template = None if spec.template.prompt is None else PromptTemplate(spec.template.prompt)
        self._system = spec.template.system
        self._chat = None if spec.template.chat == "auto" else spec.template.chat
        self._day = spec.template.day
        self._variables, self._variable_columns = spec.template.variables, spec.template.columns
        self._adds_bos = spec.template.bos == "auto"
        self._escapes = spec.template.special_tokens == "escape"
        self._markers = spec.markers
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._kind = spec.input.kind
        self._continuations: Continuations | None = None
        if spec.is_scoring:
            scored = spec.input.continuation, self._kind, tokenizer, vocab_size
            self._continuations = Continuations(*scored, choices=spec.choices)
        encoders: dict[str, Callable[[list[Any]], list[TokenIds | Failure]]] = {
            "prompt": self._encode_prompts,
            "messages": self._encode_chats,
            "token_ids": self._check_ids,
        }
        self._encode = encoders[self._kind]
        self._chats = ChatReader(spec.input.messages_format, lambda word: tokenizer.template_has(word, self._chat))
        if self._kind == "messages":
            _check_has_template(tokenizer, self._chat)
        if self._escapes and not tokenizer.can_escape:
            message = f"escape needs a newer transformers than {version('transformers')}"
            raise CheckpointError(f"template.special_tokens: {message}")

    def encode(self, table: pa.Table) -> list[Encoded | Failure]:
        """Return each row's prompt and the continuations to score after it, or a Failure.

        A job that generates has no continuations.

        table:  has the columns that the spec reads
        """
        inputs = self._read_inputs(table) if self._template is None else self._render_prompts(table, self._template)
        if self._kind == "messages":
            inputs = self._read_chats(inputs, table)
        if self._continuations is not None:
            if self._kind == "messages":
                inputs = [self._render_chat(value) for value in inputs]
            elif self._kind == "token_ids":
                inputs = self._token_ids(inputs)
            return self._continuations.encode(inputs, table)
        return [value if isinstance(value, Failure) else (value, ()) for value in self._token_ids(inputs)]

    def begins_open(self, prompt: TokenIds) -> bool | None:
        """Return whether the text after a prompt begins inside the reasoning; None where that is not known or asked."""
        return None if self._markers is None else is_open(self._markers, self._tokenizer, prompt)

    def _token_ids(self, inputs: list[Any]) -> list[TokenIds | Failure]:
        encoded = iter(self._encode([value for value in inputs if not isinstance(value, Failure)]))
        return [value if isinstance(value, Failure) else next(encoded) for value in inputs]

    def _read_inputs(self, table: pa.Table) -> list[Any]:
        null = Failure("read", "null_input", f"column {self._column!r} is null in this row")
        values = [null if value is None else value for value in read_values(table, self._column)]
        kind = {"prompt": str, "token_ids": list}.get(self._kind, object)  # JSON may have anything in any row
        return [value if isinstance(value, Failure | kind) else self._wrong(value) for value in values]

    def _wrong(self, value: Any) -> Failure:
        allowed = INPUT_TYPES[self._kind][0]
        return Failure("read", "bad_value", f"column {self._column!r} must be {allowed}, is {show(value)}")

    def _render_prompts(self, table: pa.Table, template: PromptTemplate) -> list[str | Failure]:
        """Return the prompts that the template makes of its columns."""
        columns = [read_values(table, name) for name in template.columns]
        return [_render(template, dict(zip(template.columns, row, strict=True))) for row in zip(*columns, strict=True)]

    def _encode_prompts(self, texts: list[str]) -> list[TokenIds | Failure]:
        return [_to_failure("tokenize", ids) for ids in self._tokenizer.encode_prompts(texts, adds_bos=self._adds_bos)]

    def _read_chats(self, inputs: list[Any], table: pa.Table) -> list[_Chat | Failure]:
        """Return the conversations with the variables of their rows; a null in a column is the spec's value."""
        columns = [read_values(table, column) for column in self._variable_columns.values()]
        rows = zip(*columns, strict=True) if columns else [()] * len(inputs)
        chats: list[_Chat | Failure] = []
        is_json = json_kinds(table.schema.field(self._column)) is not None
        for value, row in zip(inputs, rows, strict=True):
            messages = value if isinstance(value, Failure) else self._chats.read(value, keeps_nulls=is_json)
            failed = [item for item in (messages, *row) if isinstance(item, Failure)]
            own = {name: item for name, item in zip(self._variable_columns, row, strict=True) if item is not None}
            if failed or isinstance(messages, Failure):
                chats.append(failed[0])
            else:
                chats.append(_Chat(self._with_system(messages), {**self._variables, **own}))
        return chats

    def _encode_chats(self, chats: list[_Chat]) -> list[TokenIds | Failure]:
        conversations, variables = [chat.messages for chat in chats], [chat.variables for chat in chats]
        encoded = self._tokenizer.encode_chats(
            conversations, self._chat, self._day, variables=variables, escapes=self._escapes
        )
        return [_to_failure("template", ids) for ids in encoded]

    def _render_chat(self, chat: Any) -> str | Failure:
        if isinstance(chat, Failure):
            return chat
        try:
            return self._tokenizer.render_chat(chat.messages, self._chat, self._day, chat.variables)
        except RequestError as error:
            return Failure("template", error.code, error.message)

    def _with_system(self, chat: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the conversation with the job's system message if it has none."""
        messages = list(chat)
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
        if wrong := [name for name, value in row.items() if isinstance(value, list | dict)]:
            return Failure(
                "template", "bad_value", f"column {wrong[0]!r} must be text or a number, is {show(row[wrong[0]])}"
            )
        return template.render(row)
    except ValueError as error:
        return Failure("template", "null_column", str(error))


def _to_failure(stage: str, ids: list[int] | RequestError) -> TokenIds | Failure:
    if not isinstance(ids, RequestError):
        return ids
    return Failure("tokenize" if ids.code == "empty_prompt" else stage, ids.code, ids.message)


def _check_has_template(tokenizer: Tokenizer, chat_template: str | None) -> None:
    try:
        tokenizer.render_chat([{"role": "user", "content": "?"}], chat_template)
    except RequestError as error:
        if error.code == "no_chat_template":
            raise CheckpointError(f"input.messages: {error.message}; or give template.chat") from None
