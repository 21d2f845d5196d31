"""JobSpec: what a job is, as the user writes it in YAML. Validated once, here; no torch, ray or pyarrow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from batch.spec import types as t
from batch.spec.file import read_values
from batch.spec.problems import explain, nearest, show, wrong
from batch.spec.template import PromptTemplate
from batch.spec.yaml_text import dump_yaml
from engine.config import DTYPES, EngineConfig
from engine.errors import Problem, RequestError, SpecError
from engine.params import FIELDS, RANGES, SamplingParams, find_problems
from engine.scoring import scoring_params

COLUMN_FIELDS = tuple(name for name in FIELDS if name not in ("logprobs", "prompt_logprobs"))
INPUT_KINDS = ("prompt", "messages", "token_ids")
TASKS = ("generate", "score")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Section):
    """path: a folder, s3://, gs:// or hf://org/name."""

    path: t.Text
    dtype: Annotated[str, t.one_of(*DTYPES)] = "auto"
    max_model_len: Annotated[int | None, t.whole(1, "null")] = None
    longrope: Annotated[str, t.one_of("dynamic", "static")] = "dynamic"


class InputSpec(_Section):
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


class TemplateSpec(_Section):
    """
    system:  the system message of chats that have none
    chat:    Jinja text of a chat template; auto = the tokenizer's own
    prompt:  text with {column} in it, instead of the prompt column as it stands
    """

    system: t.MaybeText = None
    chat: t.Text = "auto"
    prompt: t.MaybeText = None

    @field_validator("prompt")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        try:
            if value is not None and not PromptTemplate(value).columns:
                raise ValueError("names no column; write {name} where a column's text belongs")
        except ValueError as error:
            raise wrong(str(error)) from None
        return value


class SamplingSpec(_Section):
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
        problems = _find_problems({**info.data, str(info.field_name): value})
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


class OutputSpec(_Section):
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


class EngineSpec(_Section):
    max_num_seqs: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    max_num_batched_tokens: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    kv_cache_memory: t.AutoSize = "auto"
    deterministic: t.AutoFlag = "auto"


class WorkersSpec(_Section):
    """gpus, cpus: a worker's."""

    min: Annotated[int, t.whole(1)] = 1
    max: Annotated[int | t.Auto, t.whole(1, "auto")] = "auto"
    gpus: Annotated[int | t.Auto, t.whole(0, "auto")] = "auto"
    cpus: Annotated[float | t.Auto, t.number(0, "auto")] = "auto"

    @field_validator("max")
    @classmethod
    def _at_least_min(cls, value: int | t.Auto, info: ValidationInfo) -> int | t.Auto:
        least = info.data.get("min", 1)
        if value != "auto" and value < least:
            raise wrong(f"must be at least workers.min ({least}), is {value}")
        return value


class LimitsSpec(_Section):
    """Failed rows the job may end with; seconds a row and the whole job may take. null = no limit."""

    max_failed_rows: Annotated[int | None, t.whole(0, "null")] = None
    row_timeout_s: Annotated[float | None, t.number(0, "null")] = None
    job_timeout_s: Annotated[float | None, t.number(0, "null")] = None


_SECTIONS = ("model", "input", "template", "sampling", "output", "engine", "workers", "limits")


class JobSpec(_Section):
    """One batch job."""

    name: t.Text = "job"
    task: Annotated[str, t.one_of(*TASKS)] = "generate"
    model: ModelSpec
    input: InputSpec
    template: TemplateSpec
    sampling: SamplingSpec
    output: OutputSpec
    engine: EngineSpec
    workers: WorkersSpec
    limits: LimitsSpec

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """A section that is missing or empty has its defaults, so that only the keys without any are asked for."""
        if not isinstance(values, dict):
            return values
        return values | {name: {} for name in _SECTIONS if values.get(name) is None}

    @field_validator("input")
    @classmethod
    def _fits_task(cls, source: InputSpec, info: ValidationInfo) -> InputSpec:
        task = info.data.get("task")
        if task == "score" and source.continuation is None:
            raise wrong("task score needs continuation, the column of what is scored")
        if task == "generate" and source.continuation is not None:
            raise wrong("continuation is for task score; task generate takes none")
        return source

    @field_validator("template")
    @classmethod
    def _fits_input(cls, template: TemplateSpec, info: ValidationInfo) -> TemplateSpec:
        if "input" not in info.data:
            return template
        kind = info.data["input"].kind
        if template.prompt is not None and kind != "prompt":
            raise wrong(f"prompt is for prompts, but input names {kind}; set it to null")
        if (template.system is not None or template.chat != "auto") and kind != "messages":
            raise wrong(f"system and chat are for messages, but input names {kind}; set input.messages or drop them")
        return template

    @field_validator("sampling")
    @classmethod
    def _samples(cls, sampling: SamplingSpec, info: ValidationInfo) -> SamplingSpec:
        if info.data.get("task") == "score" and sampling.model_fields_set:
            keys = ", ".join(name for name in SamplingSpec.model_fields if name in sampling.model_fields_set)
            raise wrong(f"task score samples nothing; drop {keys}")
        return sampling

    @field_validator("output")
    @classmethod
    def _writes(cls, output: OutputSpec, info: ValidationInfo) -> OutputSpec:
        if info.data.get("task") == "score" and output.token_ids:
            raise wrong("token_ids is for task generate; logprobs writes the token ids of what is scored")
        return output

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        if self.task == "score":  # which would refuse what is in it
            values.pop("sampling", None)
        return values

    def to_yaml(self) -> str:
        """Text that load_spec reads back as the same spec: every key, defaults too."""
        return dump_yaml(self.model_dump())

    def sampling_params(self, row: Mapping[str, Any] | None = None) -> SamplingParams:
        """The spec's, with the values of `row` (sampling field -> value, null = the spec's); what scoring takes where
        that is the task.

        Raises RequestError("bad_params") where a row's value is out of range.
        """
        if self.task == "score":
            return scoring_params(self.output.logprobs)
        values = self.sampling.model_dump(exclude={"columns"}) | {"logprobs": self.output.logprobs}
        for name, value in (row or {}).items():
            if value is not None:
                values[name] = _from_arrow(name, value)
        if problems := list(_find_problems(values)):
            raise RequestError("bad_params", "; ".join(map(str, problems)))
        return SamplingParams(**values)

    def engine_config(self) -> EngineConfig:
        """The engine's side of the spec; auto becomes None."""
        chosen = {key: None if value == "auto" else value for key, value in self.engine.model_dump().items()}
        return EngineConfig(**(self.model.model_dump(exclude={"path"}) | chosen))


def _find_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """As find_problems, but for the engine's max_tokens 0: a row that generates nothing is no answer."""
    if type(values.get("max_tokens")) is int and values["max_tokens"] == 0:
        yield Problem("max_tokens", "must be a whole number, 1 or more, is 0")
    yield from find_problems(values)


def _from_arrow(name: str, value: Any) -> Any:
    """A value of a Parquet column as SamplingParams take it: pandas stores whole numbers beside nulls as floats, and
    Arrow hands out lists, and maps as lists of pairs."""
    if name in RANGES and RANGES[name][2] and isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "logit_bias" and isinstance(value, list):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a spec; `overrides` are `sampling.temperature=0.7`, their values YAML.

    Raises SpecError with every mistake in it; at the first one where the text is not YAML.
    """
    values, problems = read_values(Path(path), overrides)
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError([*problems, *explain(error, JobSpec)]) from None
    if problems:
        raise SpecError(problems)
    return spec
