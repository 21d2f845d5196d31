"""The sections of a job spec: their keys, defaults and allowed values."""

import dataclasses
import datetime
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from moray.batch.spec.structured import COLUMN_NAMES, PREFIX, StructuredValue
from moray.batch.spec.template import PromptTemplate
from moray.engine.config import Dtype
from moray.engine.errors import Problem, show
from moray.engine.params import SamplingFields, find_problems
from moray.engine.settings import types as t
from moray.engine.settings.problems import nearest
from moray.engine.settings.types import wrong
from moray.engine.text.chat_template import find_reserved_mistake, find_template_mistake

logger = logging.getLogger(__name__)

COLUMN_FIELDS = (*(field.name for field in dataclasses.fields(SamplingFields)), *COLUMN_NAMES)


def _is_day(value: str) -> bool:
    """Return whether a text is `today` or a full date in ISO 8601, YYYY-MM-DD."""
    with suppress(ValueError):
        return value == "today" or datetime.date.fromisoformat(value).isoformat() == value
    return False


Day = Annotated[str, t.expect(_is_day), t.must("today or a date such as 2026-11-29")]
Accelerator = Annotated[t.Text | None, t.must("null or a type of GPU")]
Percent = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?%$"), t.expect(lambda value: float(value.rstrip("% ")) <= 100)]
RowLimit = Annotated[
    t.Whole | Percent | None, t.must("null, a whole number, 0 or more, or a share of the rows such as 0.5%")
]


class Section(BaseModel):
    """Makes all sections immutable, and refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(Section):
    """Names the model.

    path:           a folder, s3://, gs:// or hf://org/name
    quantization:   what the weights of experts and attention are quantized to while they are loaded; None = they stay
                    as the checkpoint has them
    max_model_len:  most tokens of a sequence; None = the model's
    longrope:       dynamic = factors by a row's length; static = the long ones for all rows, where max_model_len
                    exceeds the original length
    """

    path: t.Text
    dtype: Dtype = "auto"
    quantization: t.Quantization = None
    max_model_len: t.MaybeCount = None
    longrope: Literal["dynamic", "static"] = "dynamic"


class TemplateSpec(Section):
    """Describes how prompts are made.

    system:          system message of chats that have none
    chat:            Jinja text of a chat template; auto = the tokenizer's own
    prompt:          text with {column} in it, instead of the prompt column itself
    date:            date for a chat template that asks for one; today = the day on which the job starts
    bos:             auto = prompts get the special tokens that the tokenizer adds around a text; never = none
    special_tokens:  how names of special tokens in messages are encoded: allow = as those tokens, escape = as text
    variables:       variables that the chat template gets besides the messages, such as enable_thinking
    columns:         variable -> input column with each row's value; null = the spec's
    """

    system: t.MaybeText = None
    chat: t.Text = "auto"
    prompt: t.MaybeText = None
    date: Day = "today"
    bos: Literal["auto", "never"] = "auto"
    special_tokens: Literal["allow", "escape"] = "allow"
    variables: t.Json = {}
    columns: t.Columns = {}

    @property
    def day(self) -> datetime.date | None:
        """Return the date; None while it is "today"."""
        return None if self.date == "today" else datetime.date.fromisoformat(self.date)

    @field_validator("chat")
    @classmethod
    def _is_jinja(cls, value: str) -> str:
        if value != "auto" and (mistake := find_template_mistake(value)) is not None:
            raise wrong(f"must be auto or a Jinja template, is {show(value)}: {mistake}")
        return value

    @field_validator("variables", "columns")
    @classmethod
    def _may_be_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        if mistakes := [mistake for name in values if (mistake := find_reserved_mistake(name)) is not None]:
            raise wrong("; ".join(mistakes))
        return values

    @field_validator("prompt")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        try:
            if value is not None and not PromptTemplate(value).columns:
                raise ValueError("names no column; write {name} where a column's text belongs")
        except ValueError as error:
            raise wrong(str(error)) from None
        return value


NO_TOKENS = Problem("max_tokens", "must be a whole number, 1 or more, is 0")


def find_sampling_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Find problems as the engine does, and refuse max_tokens 0, which the engine allows: such a row has no answer."""
    if type(values.get("max_tokens")) is int and values["max_tokens"] == 0:
        yield NO_TOKENS
    yield from find_problems(values)


class SamplingSpec(Section, SamplingFields, frozen=True):  # type: ignore[misc]  # Section is frozen by its model_config
    """Holds the sampling fields as a spec writes them.

    structured:  what the text must obey: one of json_schema, regex, choice, grammar, json_object
    columns:     sampling field -> input column with each row's value; null = the spec's
    """

    logit_bias: Mapping[int, float] = {}  # pydantic cannot inherit a default that a function makes
    structured: StructuredValue = None
    columns: dict[str, str] = {}

    @property
    def structured_columns(self) -> dict[str, str]:
        """Return kind -> input column, for what each row's text must obey."""
        return {name.removeprefix(PREFIX): column for name, column in self.columns.items() if name.startswith(PREFIX)}

    @field_validator("*", mode="before")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        problems = find_sampling_problems({**info.data, str(info.field_name): value})
        if mistakes := [p.message for p in problems if p.path == info.field_name]:
            raise wrong("; ".join(mistakes))
        return tuple(value) if isinstance(value, list) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _check_columns(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kinds := value.get("structured"), dict):  # from `--set`
            value = {name: column for name, column in value.items() if name != "structured"}
            value |= {f"{PREFIX}{kind}": column for kind, column in kinds.items()}
        if not isinstance(value, dict) or not all(
            isinstance(column, str) and column.strip() for column in value.values()
        ):
            raise wrong(f"must map sampling fields to input columns, is {show(value)}")
        if unknown := [field for field in value if field not in COLUMN_FIELDS]:
            raise wrong("; ".join(f"unknown field {f!r}{nearest(str(f), COLUMN_FIELDS)}" for f in unknown))
        return value

    @field_validator("structured", "columns")
    @classmethod
    def _can_end(cls, value: Any, info: ValidationInfo) -> Any:
        is_given = value is not None if info.field_name == "structured" else any(name in COLUMN_NAMES for name in value)
        if is_given and info.data.get("ignore_eos"):
            raise wrong("ignore_eos must be false with structured: a text ends where it obeys")
        return value


class OutputSpec(Section):
    """Describes the output.

    path:       the output folder
    keep:       input columns to write to the output
    token_ids:  write the column generated_token_ids
    special_tokens:  whether names of special tokens are part of the text
    reasoning:  what is around the reasoning of a model: it becomes a column of its own, next to the answer
    parse:      write the column parsed, with the JSON of sampling.structured as typed values
    logprobs:   write the column logprobs (task score: token_logprobs) with each token's and this many best ones
    """

    path: t.Text
    keep: t.Keep = "all"
    token_ids: bool = False
    special_tokens: Literal["drop", "keep"] = "drop"
    reasoning: t.Reasoning = None
    parse: bool = False
    logprobs: int | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if mistakes := [p.message for p in find_problems({"logprobs": value})]:
            raise wrong("; ".join(mistakes))
        return value


class EngineSpec(Section):
    """Holds settings of the engine; auto = the engine chooses. See EngineConfig.

    kv_cache_dtype:  what keys and values are stored in: "model" = the model's dtype, "fp8" = float8 e4m3 with scales
    dedup:           whether a row gets a copy of the answer of an equal one, where nothing in it is random
    """

    max_num_seqs: t.AutoCount = "auto"
    max_num_batched_tokens: t.AutoCount = "auto"
    kv_cache_memory: t.AutoSize = "auto"
    kv_cache_dtype: t.AutoKvCacheDtype = "auto"
    tensor_parallel: t.NumRanks = "auto"
    expert_parallel: bool = False
    dedup: Literal["auto", "off"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _drop_deterministic(cls, values: Any) -> Any:
        """Drop a key without effect, which specs had and job folders still have."""
        if not isinstance(values, dict) or "deterministic" not in values:
            return values
        logger.warning("engine.deterministic: results are always deterministic, and the key is gone; remove it")
        return {name: value for name, value in values.items() if name != "deterministic"}


class WorkersSpec(Section):
    """Describes the workers.

    min, max:         number of workers
    gpus, cpus:       logical resources of one worker; each rank has a GPU of its own
    accelerator:      model of its GPU, by Ray's names
    labels:           labels of the nodes that workers run on, as Ray's label selectors
    io_labels:        labels of the nodes that read and write files
    start_timeout_s:  time in which one actor of each stage must be ready; null = no limit
    """

    min: t.Count = 1
    max: t.AutoCount = "auto"
    gpus: t.AutoGpus = "auto"
    cpus: t.AutoAmount = "auto"
    accelerator: Accelerator = None
    labels: t.Labels = {}
    io_labels: t.Labels = {}
    start_timeout_s: t.MaybeSeconds = 3600.0

    @field_validator("max")
    @classmethod
    def _at_least_min(cls, value: int | t.Auto, info: ValidationInfo) -> int | t.Auto:
        minimum = info.data.get("min", 1)
        if value != "auto" and value < minimum:
            raise wrong(f"must be at least workers.min ({minimum}), is {value}")
        return value

    @field_validator("accelerator")
    @classmethod
    def _has_gpu(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("gpus") == 0:
            raise wrong(f"names a GPU ({value}), but workers.gpus is 0")
        return value


class LimitsSpec(Section):
    """Holds the limits of a job; null = no limit.

    max_failed_rows:  rows that may fail, as a number or as a share of all rows (2%)
    row_timeout_s:    seconds that a row may run
    job_timeout_s:    seconds that the whole job may take
    restarts:         how often in succession a driver that died is restarted without a part committed in between
    """

    max_failed_rows: RowLimit = None
    row_timeout_s: t.MaybeSeconds = None
    job_timeout_s: t.MaybeSeconds = None
    restarts: t.Whole = 3

    def max_failed(self, num_rows: int) -> int | None:
        """Return how many of `num_rows` rows may fail; None = all."""
        if isinstance(self.max_failed_rows, str):
            return math.floor(Fraction(self.max_failed_rows.rstrip("% ")) * num_rows / 100)
        return self.max_failed_rows
