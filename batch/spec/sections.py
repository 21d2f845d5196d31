"""The sections of a job spec: their keys, defaults and what each of them takes."""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from batch.spec import types as t
from batch.spec.problems import nearest, wrong
from batch.spec.template import PromptTemplate
from engine.chat_template import find_template_mistake
from engine.config import DTYPES
from engine.errors import Problem, show
from engine.params import FIELDS, find_problems

COLUMN_FIELDS = tuple(name for name in FIELDS if name not in ("logprobs", "prompt_logprobs"))
INPUT_KINDS = ("prompt", "messages", "token_ids")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Section):
    """path: a folder, s3://, gs:// or hf://org/name."""

    path: t.Text
    dtype: Annotated[str, t.one_of(*DTYPES)] = "auto"
    max_model_len: Annotated[int | None, t.whole(1, "null")] = None
    longrope: Annotated[str, t.one_of("dynamic", "static")] = "dynamic"


class InputSpec(Section):
    """
    path:          file, folder, glob, or a list of them
    prompt, messages, token_ids:  one of them names a column
    continuation:  for task score: column of what is scored after the prompt, one or a list a row
    """

    path: t.Paths
    prompt: t.Column = None
    messages: t.Column = None
    token_ids: t.Column = None
    continuation: t.Column = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_by_default(cls, values: Any) -> Any:
        if not isinstance(values, dict) or any(values.get(kind) is not None for kind in INPUT_KINDS):
            return values
        return values | {"prompt": "prompt"}

    @field_validator("messages", "token_ids")
    @classmethod
    def _stands_alone(cls, value: str | None, info: ValidationInfo) -> str | None:
        others = [f"input.{kind}" for kind in INPUT_KINDS if info.data.get(kind) is not None]
        if value is not None and others:
            raise wrong(f"only one of {', '.join(INPUT_KINDS)} may name a column; set {' and '.join(others)} to null")
        return value

    @property
    def kind(self) -> str:
        """One of INPUT_KINDS."""
        return next(kind for kind in INPUT_KINDS if getattr(self, kind) is not None)

    @property
    def column(self) -> str:
        return str(getattr(self, self.kind))


class TemplateSpec(Section):
    """
    system:  the system message of chats that have none
    chat:    Jinja text of a chat template; auto = the tokenizer's own
    prompt:  text with {column} in it, instead of the prompt column as it stands
    """

    system: t.MaybeText = None
    chat: t.Text = "auto"
    prompt: t.MaybeText = None

    @field_validator("chat")
    @classmethod
    def _is_jinja(cls, value: str) -> str:
        if value != "auto" and (mistake := find_template_mistake(value)) is not None:
            raise wrong(f"must be auto or a Jinja template, is {show(value)}: {mistake}")
        return value

    @field_validator("prompt")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        try:
            if value is not None and not PromptTemplate(value).columns:
                raise ValueError("names no column; write {name} where a column's text belongs")
        except ValueError as error:
            raise wrong(str(error)) from None
        return value


def find_sampling_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """As find_problems, but for the engine's max_tokens 0: a row that generates nothing is no answer."""
    if type(values.get("max_tokens")) is int and values["max_tokens"] == 0:
        yield Problem("max_tokens", "must be a whole number, 1 or more, is 0")
    yield from find_problems(values)


class SamplingSpec(Section):
    """SamplingParams as a spec writes them. columns: sampling field -> input column with a value a row (null = the
    spec's)."""

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    columns: dict[str, str] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        problems = find_sampling_problems({**info.data, str(info.field_name): value})
        if mistakes := [p.message for p in problems if p.path == info.field_name]:
            raise wrong("; ".join(mistakes))
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _names_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not all(t.is_text(column) for column in value.values()):
            raise wrong(f"must map sampling fields to input columns, is {show(value)}")
        if unknown := [field for field in value if field not in COLUMN_FIELDS]:
            raise wrong("; ".join(f"unknown field {f!r}{nearest(str(f), COLUMN_FIELDS)}" for f in unknown))
        return value


class OutputSpec(Section):
    """
    keep:       input columns to carry through
    token_ids:  write generated_token_ids
    logprobs:   write logprobs (task score: token_logprobs): the token's and this many best ones'
    """

    path: t.Text
    keep: t.Keep = "all"
    token_ids: t.Flag = False
    logprobs: int | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if mistakes := [p.message for p in find_problems({"logprobs": value})]:
            raise wrong("; ".join(mistakes))
        return value


class EngineSpec(Section):
    max_num_seqs: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    max_num_batched_tokens: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    kv_cache_memory: t.AutoSize = "auto"
    deterministic: t.AutoFlag = "auto"


class WorkersSpec(Section):
    """
    gpus, cpus:       a worker's
    accelerator:      the type of its GPU, by Ray's names
    labels:           of the nodes that workers run on, as Ray's label selectors
    io_labels:        of those that files are read and written on
    start_timeout_s:  in which one actor of each stage must be ready
    """

    min: Annotated[int, t.whole(1)] = 1
    max: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    gpus: t.Gpus = "auto"
    cpus: Annotated[float | t.Auto, t.number(0, "auto")] = "auto"
    accelerator: Annotated[str | None, t.must("null or a type of GPU", lambda v: v is None or t.is_text(v))] = None
    labels: t.Labels = {}
    io_labels: t.Labels = {}
    start_timeout_s: Annotated[float | None, t.number(0, "null")] = 3600.0

    @field_validator("max")
    @classmethod
    def _at_least_min(cls, value: int | t.Auto, info: ValidationInfo) -> int | t.Auto:
        least = info.data.get("min", 1)
        if value != "auto" and value < least:
            raise wrong(f"must be at least workers.min ({least}), is {value}")
        return value

    @field_validator("accelerator")
    @classmethod
    def _has_gpu(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("gpus") == 0:
            raise wrong(f"names a GPU ({value}), but workers.gpus is 0")
        return value


class LimitsSpec(Section):
    """Failed rows the job may end with, as a number or as a share (2%); seconds a row and the whole job may take.
    null = no limit."""

    max_failed_rows: t.Share = None
    row_timeout_s: Annotated[float | None, t.number(0, "null")] = None
    job_timeout_s: Annotated[float | None, t.number(0, "null")] = None

    def max_failed(self, num_rows: int) -> int | None:
        """Of so many rows."""
        if isinstance(self.max_failed_rows, str):
            return math.floor(Fraction(self.max_failed_rows.rstrip("% ")) * num_rows / 100)
        return self.max_failed_rows
