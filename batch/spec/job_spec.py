"""JobSpec: what a job is, as the user writes it in YAML. Validated once, here; no torch, ray or pyarrow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from batch.spec import types as t
from batch.spec.file import read_values
from batch.spec.problems import explain, wrong
from batch.spec.sections import (
    EngineSpec,
    InputSpec,
    LimitsSpec,
    ModelSpec,
    OutputSpec,
    SamplingSpec,
    Section,
    TemplateSpec,
    WorkersSpec,
    find_sampling_problems,
)
from batch.spec.yaml_text import dump_yaml
from engine.config import EngineConfig
from engine.errors import RequestError, SpecError
from engine.params import RANGES, SamplingParams
from engine.scoring import scoring_params

TASKS = ("generate", "score")
_SECTIONS = ("model", "input", "template", "sampling", "output", "engine", "workers", "limits")


class JobSpec(Section):
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

    @field_validator("workers")
    @classmethod
    def _share_cards(cls, workers: WorkersSpec, info: ValidationInfo) -> WorkersSpec:
        engine = info.data.get("engine")
        if workers.gpus != "auto" and 0 < workers.gpus < 1 and engine is not None and engine.kv_cache_memory == "auto":
            raise wrong(
                f"gpus is {workers.gpus:g}, but the first worker on a card would take all of its memory; set "
                "engine.kv_cache_memory"
            )
        return workers

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
        if problems := list(find_sampling_problems(values)):
            raise RequestError("bad_params", "; ".join(map(str, problems)))
        return SamplingParams(**values)

    def engine_config(self) -> EngineConfig:
        """The engine's side of the spec; auto becomes None."""
        chosen = {key: None if value == "auto" else value for key, value in self.engine.model_dump().items()}
        return EngineConfig(**(self.model.model_dump(exclude={"path"}) | chosen))


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
