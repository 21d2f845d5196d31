"""The section `input` of a job spec: which files, which of their rows, and which columns make the prompts."""

from typing import Annotated, Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from moray.batch.spec.sections import Percent, Section
from moray.batch.spec.where import parse_where
from moray.engine.settings import types as t
from moray.engine.settings.types import wrong

HiveChoice = Annotated[bool | t.Auto, t.must("auto, true or false")]
MessagesFormat = Literal["auto", "openai", "sharegpt"]
FormatChoice = Literal["auto", "parquet", "jsonl"]
INPUT_KINDS = ("prompt", "messages", "token_ids")
RowShare = Annotated[
    t.Count | Annotated[Percent, t.expect(lambda value: float(value.rstrip("% ")) > 0)] | None,
    t.must("null, a whole number, 1 or more, or a share of the rows such as 1%"),
]


class InputSpec(Section):
    """Names the input.

    path:          file, folder, glob, or a list of them
    format:        format of the files; auto = as their names say
    hive:          whether names of folders such as lang=en are columns; auto = if there are any; true = there must be
    where:         condition on columns; rows that do not meet it are not rows of the job. None = all rows
    sample:        rows that are drawn at random from those, as a number or as a share; None = all
    sample_seed:   seed of that draw
    limit:         the first rows of those, this many; None = all
    prompt, messages, token_ids:  exactly one of them names a column
    messages_format:  names of the fields of messages: role and content, or from and value; auto = as they have them
    continuation:  for task score: column with the text to score after the prompt, one or a list a row
    """

    path: t.Paths
    format: FormatChoice = "auto"
    hive: HiveChoice = "auto"
    where: t.MaybeText = None
    sample: RowShare = None
    sample_seed: t.Whole = 0
    limit: t.MaybeCount = None
    prompt: t.Column = None
    messages: t.Column = None
    token_ids: t.Column = None
    messages_format: MessagesFormat = "auto"
    continuation: t.Column = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_by_default(cls, values: Any) -> Any:
        if not isinstance(values, dict) or any(values.get(kind) is not None for kind in INPUT_KINDS):
            return values
        return values | {"prompt": "prompt"}

    @field_validator("messages", "token_ids")
    @classmethod
    def _check_only_kind(cls, value: str | None, info: ValidationInfo) -> str | None:
        others = [f"input.{kind}" for kind in INPUT_KINDS if info.data.get(kind) is not None]
        if value is not None and others:
            raise wrong(f"only one of {', '.join(INPUT_KINDS)} may name a column; set {' and '.join(others)} to null")
        return value

    @field_validator("where")
    @classmethod
    def _is_condition(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                parse_where(value)
        except ValueError as error:
            raise wrong(str(error)) from None
        return value

    @property
    def selects(self) -> bool:
        """Return whether only some rows of the files may be rows of the job."""
        return self.where is not None or self.sample is not None or self.limit is not None

    @field_validator("messages_format")
    @classmethod
    def _check_messages(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and info.data.get("messages") is None:
            raise wrong("is for messages; set input.messages or drop it")
        return value

    @property
    def kind(self) -> str:
        """Return which of INPUT_KINDS the input has."""
        return next(kind for kind in INPUT_KINDS if getattr(self, kind) is not None)

    @property
    def column(self) -> str:
        return str(getattr(self, self.kind))
