"""Plan a job: find its files, model, fingerprint and shards, before anything runs."""

from collections.abc import Iterator
from dataclasses import dataclass

from moray.batch.fingerprint import compute_fingerprint
from moray.batch.input import InputFiles, read_input
from moray.batch.plan.chat_date import find_chat_template, resolve_date
from moray.batch.plan.gpus import check_gpus
from moray.batch.plan.model_info import ModelInfo, read_config, read_model_info
from moray.batch.shards import Plan, Shard, cut_shards
from moray.batch.spec import JobSpec
from moray.engine.checkpoint.digest import weights_digest
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.config import ModelConfig
from moray.engine.core.limits import cache_bytes, check_length, find_config_problems, num_cached_tokens
from moray.engine.errors import CheckpointError, Problem, RequestError, SpecError
from moray.engine.float_dtypes import ITEM_BYTES
from moray.engine.params import find_unknown_tokens
from moray.engine.text.chat_template import find_template_mistake, find_variable_mistake, find_variables
from moray.engine.text.tokenizer import TOKENIZER_FILES


@dataclass(frozen=True)
class PlannedJob:
    """Holds what a job needs to run, from its start or where an earlier run stopped."""

    spec: JobSpec
    input: InputFiles
    model: ModelSource
    config: ModelConfig
    model_info: ModelInfo
    plan: Plan


def plan_job(spec: JobSpec) -> PlannedJob:
    """Plan a job from the footers of its input and the headers of its model. Writes nothing and loads no weights.
    Input of JSON lines is read as a whole, once.

    Raises UserError where input or model do not fit the spec.
    """
    files = read_input(spec)
    model = ModelSource(spec.model.path)
    config = read_config(model, spec.model.quantization, spec.engine_config().kv_cache_dtype)
    info = read_model_info(model, config, spec.model.dtype)
    _check_model(spec, model, config, info)
    spec = resolve_date(spec, model)
    fingerprint = compute_fingerprint(
        spec,
        files={file.path: file.identity for file in files.files},
        model={"files": weights_digest(model)},
        quantization=info.quantization,
        kv_cache=info.kv_cache,
        hive_keys=files.hive_keys,
    )
    cut = cut_shards(files.rows, max(1, tokens_per_row(spec)))
    shards = tuple(Shard(shard.index, files.place(shard.slices)) for shard in cut)
    return PlannedJob(spec, files, model, config, info, Plan(fingerprint, shards, files.warnings))


def _check_model(spec: JobSpec, model: ModelSource, config: ModelConfig, info: ModelInfo) -> None:
    """Raise UserError for what a worker would find only after it has loaded the model."""
    if problems := list(_find_problems(spec, config, ITEM_BYTES[info.dtype])):
        raise SpecError(problems)
    if not any(name in model.files() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{model.path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be in the folder")
    if spec.input.kind == "messages":
        _check_chat_template(spec, model)
    if spec.workers.accelerator is not None:
        check_gpus(spec, config, info, [spec.workers.accelerator])


def _find_problems(spec: JobSpec, config: ModelConfig, itemsize: int) -> Iterator[Problem]:
    """Find what would fail every row, or the engine's start."""
    engine = spec.engine_config()
    if problems := list(find_config_problems(engine, config, itemsize)):
        yield from problems
        return
    if spec.is_scoring:
        return
    for problem in find_unknown_tokens(spec.sampling.model_dump(), config.vocab_size):
        yield Problem(f"sampling.{problem.path}", problem.message)
    if "max_tokens" in spec.sampling.columns:
        return
    context, max_tokens = engine.max_model_len or config.max_position_embeddings, spec.sampling.max_tokens
    try:
        check_length(1, max_tokens, context, key="model.max_model_len")  # of the shortest prompt
    except RequestError as error:
        yield Problem("sampling.max_tokens", error.message)
    shortest, memory = num_cached_tokens(1, max_tokens), engine.kv_cache_memory
    if memory is not None and (needed := cache_bytes(shortest, config, itemsize, engine.tensor_parallel or 1)) > memory:
        message = f"must hold a row with sampling.max_tokens ({max_tokens:,}), {needed:,} bytes, is {memory:,}"
        yield Problem("engine.kv_cache_memory", message)


def _check_chat_template(spec: JobSpec, model: ModelSource) -> None:
    """Raise CheckpointError where the chat template is not valid Jinja, SpecError where it does not read a variable.

    A missing template is an error of each row.
    """
    name, text = find_chat_template(spec, model)
    if (mistake := find_template_mistake(text)) is not None:
        raise CheckpointError(
            f"{model.path}/{name}: the chat template is not valid Jinja: {mistake}; fix it, or give template.chat"
        )
    known = find_variables(text)
    given = [("template.variables", name) for name in spec.template.variables]
    given += [("template.columns", name) for name in spec.template.columns]
    found = [(key, find_variable_mistake(name, known)) for key, name in given]
    if problems := [Problem(key, mistake) for key, mistake in found if mistake is not None]:
        raise SpecError(problems)


def tokens_per_row(spec: JobSpec) -> int:
    """Return the most tokens that a row may generate, over its samples, without the rows' own max_tokens and n."""
    return spec.sampling.max_tokens * spec.sampling.n if not spec.is_scoring else 0
