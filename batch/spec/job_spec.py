"""JobSpec: a job as the user writes it in YAML. It is validated once, here, without torch, ray or pyarrow."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from moray.batch.parsed.json_type import JsonType
from moray.batch.spec.file import read_yaml_file
from moray.batch.spec.input_section import InputSpec
from moray.batch.spec.sections import (
    NO_TOKENS,
    EngineSpec,
    LimitsSpec,
    ModelSpec,
    OutputSpec,
    SamplingSpec,
    Section,
    TemplateSpec,
    WorkersSpec,
)
from moray.batch.spec.structured import PREFIX, read_row
from moray.batch.spec.structured_checks import check_choices, check_structured_output
from moray.engine.config import EngineConfig, KeptTokens
from moray.engine.errors import RequestError, SpecError
from moray.engine.params import SamplingParams, is_integer
from moray.engine.partition import find_gpu_mistake
from moray.engine.sampling.scoring import scoring_params
from moray.engine.settings import types as t
from moray.engine.settings.markers import Markers, find_markers
from moray.engine.settings.reader import read_settings
from moray.engine.settings.types import wrong
from moray.engine.settings.yaml_text import dump_yaml, parse_yaml

_SECTIONS = ("model", "input", "template", "sampling", "output", "engine", "workers", "limits")


class JobSpec(Section):
    """Describes one batch job. docs/job-spec.md explains the keys."""

    name: t.Text = "job"
    task: Literal["generate", "score", "classify"] = "generate"
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
        """Give a section that is missing or empty its defaults, so that only keys without defaults are required."""
        if not isinstance(values, dict):
            return values
        return values | {name: {} for name in _SECTIONS if values.get(name) is None}

    @field_validator("input")
    @classmethod
    def _check_task(cls, source: InputSpec, info: ValidationInfo) -> InputSpec:
        task = info.data.get("task")
        if task == "score" and source.continuation is None:
            raise wrong("task score needs continuation, the column of what is scored")
        if task in ("generate", "classify") and source.continuation is not None:
            raise wrong(f"continuation is for task score; task {task} takes none")
        if task == "classify" and source.token_ids is not None:
            raise wrong("task classify needs text: prompt or messages; with token_ids use task score")
        return source

    @field_validator("template")
    @classmethod
    def _check_input(cls, template: TemplateSpec, info: ValidationInfo) -> TemplateSpec:
        if "input" not in info.data:
            return template
        kind = info.data["input"].kind
        if template.prompt is not None and kind != "prompt":
            raise wrong(f"prompt is for prompts, but input names {kind}; set it to null")
        generates = info.data.get("task") == "generate"
        if template.special_tokens == "escape" and not generates:
            raise wrong("special_tokens: escape is for task generate")
        if template.bos != "auto" and (kind != "prompt" or not generates):
            raise wrong("bos is for prompts and task generate; drop it")
        names = ("system", "chat", "date", "special_tokens", "variables", "columns")
        given = [name for name in names if getattr(template, name) != TemplateSpec.model_fields[name].default]
        if given and kind != "messages":
            what = f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for messages"
            raise wrong(
                f"{what}, but input names {kind}; set input.messages or drop {'it' if len(given) == 1 else 'them'}"
            )
        return template

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, sampling: SamplingSpec, info: ValidationInfo) -> SamplingSpec:
        if info.data.get("task") == "score" and sampling.model_fields_set:
            keys = ", ".join(name for name in SamplingSpec.model_fields if name in sampling.model_fields_set)
            raise wrong(f"task score samples nothing; drop {keys}")
        if info.data.get("task") == "classify":
            check_choices(sampling)
        return sampling

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: OutputSpec, info: ValidationInfo) -> OutputSpec:
        task, sampling = info.data.get("task"), info.data.get("sampling")
        if task == "score" and output.token_ids:
            raise wrong("token_ids is for task generate; logprobs writes the token ids of what is scored")
        for name in ("token_ids", "logprobs") if task == "classify" else ():
            if getattr(output, name) != OutputSpec.model_fields[name].default:
                raise wrong(f"{name} is not for task classify; task score writes the logprobs of each choice")
        for name in ("special_tokens", "reasoning", "parse"):
            if task in ("score", "classify") and getattr(output, name) != OutputSpec.model_fields[name].default:
                raise wrong(f"{name} is for task generate; task {task} writes no text")
        if sampling is not None and task == "generate":
            check_structured_output(output, sampling)
        return output

    @field_validator("workers")
    @classmethod
    def _check_gpus(cls, workers: WorkersSpec, info: ValidationInfo) -> WorkersSpec:
        engine = info.data.get("engine")
        if engine is None or workers.gpus == "auto":
            return workers
        if (mistake := find_gpu_mistake(workers.gpus, engine.tensor_parallel)) is not None:
            raise wrong(f"gpus is {workers.gpus:g}, but engine.{mistake}")
        if 0 < workers.gpus < 1 and engine.kv_cache_memory == "auto":
            raise wrong(
                f"gpus is {workers.gpus:g}, but the first worker on a GPU would use all of its memory; set "
                "engine.kv_cache_memory"
            )
        return workers

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        if self.task == "score":  # that task refuses a sampling section
            values.pop("sampling", None)
        elif self.task == "classify":  # that one takes the choices alone
            values["sampling"] = {"structured": values["sampling"]["structured"]}
        return values

    def to_yaml(self) -> str:
        """Return YAML with every key, defaults too, which from_yaml reads back as the same spec."""
        return dump_yaml(self.model_dump())

    @classmethod
    def from_yaml(cls, text: str) -> "JobSpec":
        """Parse what to_yaml returned."""
        return cls.model_validate(parse_yaml(text))

    def gpus_per_worker(self, *, has_gpus: bool) -> float:
        """Return the GPUs of a worker; with `auto` one for each rank, or none.

        has_gpus: there are GPUs where the workers run; those that name a model of GPU are on such nodes
        """
        if self.workers.gpus != "auto":
            return self.workers.gpus
        return float(self.engine_config().tensor_parallel or 1) if has_gpus or self.workers.accelerator else 0.0

    def sampling_params(self, row: Mapping[str, Any] | None = None) -> SamplingParams:
        """Return a row's sampling parameters: the spec's, with the row's own values; for task score those of scoring.

        row: sampling field -> value; null = the spec's

        Raises RequestError("bad_params") where a row's value is out of range, and "bad_grammar" where its schema or
        grammar has a mistake.
        """
        if self.is_scoring:
            return scoring_params(self.output.logprobs)
        values = self.sampling.model_dump(exclude={"columns"}) | {"logprobs": self.output.logprobs}
        own = {name.removeprefix(PREFIX): value for name, value in (row or {}).items() if name.startswith(PREFIX)}
        values["structured"] = read_row(own) or self.sampling.structured
        for name, value in (row or {}).items():
            if value is not None and not name.startswith(PREFIX):
                values[name] = _from_arrow(name, value)
        params = SamplingParams(**values)
        if params.max_tokens == 0:
            raise RequestError.bad_params([NO_TOKENS])
        return params

    def engine_config(self) -> EngineConfig:
        """Return the engine's config; auto becomes None, and tensor_parallel the number of a worker's GPUs."""
        values = self.engine.model_dump(exclude={"dedup"})
        chosen = {key: None if value == "auto" else value for key, value in values.items()}
        if self.engine.tensor_parallel == "auto" and self.workers.gpus != "auto" and self.workers.gpus > 1:
            chosen["tensor_parallel"] = int(self.workers.gpus)
        of_model = self.model.model_dump(exclude={"path"})
        return EngineConfig(**(of_model | chosen), is_bulk=True, special_tokens=self.kept_tokens)

    @property
    def is_scoring(self) -> bool:
        """Return whether the job scores texts, and generates none."""
        return self.task != "generate"

    @property
    def is_structured(self) -> bool:
        """Return whether generated texts obey a schema or a grammar, at least in some rows."""
        return not self.is_scoring and (self.sampling.structured is not None or bool(self.sampling.structured_columns))

    @property
    def choices(self) -> tuple[str, ...]:
        """Return what task classify chooses from; nothing for other tasks."""
        if self.task != "classify" or self.sampling.structured is None:
            return ()
        return tuple(json.loads(self.sampling.structured.text))

    @property
    def parsed_type(self) -> JsonType | None:
        """Return the type of the column parsed; None where there is none."""
        structured = self.sampling.structured
        if not self.output.parse or structured is None:
            return None
        return JsonType.of_structured(structured.kind, structured.text)

    @property
    def markers(self) -> Markers | None:
        """Return what is around the reasoning; None where it is not split off."""
        return find_markers(self.output.reasoning)

    @property
    def kept_tokens(self) -> KeptTokens:
        """Return which special tokens are part of texts until the reasoning is split off: those of its markers too."""
        if self.output.special_tokens == "keep":
            return "keep"
        return "drop" if self.markers is None else self.markers.texts


def _from_arrow(name: str, value: Any) -> Any:
    """Convert a value of a Parquet column for SamplingParams: pandas stores whole numbers as floats where a column has
    nulls, and Arrow returns lists, and maps as lists of pairs. Keys of JSON are text."""
    if is_integer(name) and isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "logit_bias" and isinstance(value, list):
        return dict(value)
    if name == "logit_bias" and isinstance(value, dict):
        return {int(key) if re.fullmatch(r"\d{1,18}", key, re.ASCII) else key: bias for key, bias in value.items()}
    return tuple(value) if isinstance(value, list) else value


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read and validate a spec.

    overrides: texts such as `sampling.temperature=0.7`, with values in YAML

    Raises SpecError with every mistake in it, or with the first one where the text is not YAML.
    """
    values = read_yaml_file(Path(path))
    return read_settings(JobSpec, values, overrides, example="sampling.temperature=0.7", error_type=SpecError)
