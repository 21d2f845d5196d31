"""From a spec to all that is decided before anything runs: files, model, fingerprint, shards."""

from collections.abc import Iterator
from dataclasses import dataclass

from batch.input import InputFiles, read_input
from batch.placement.cards import check_cards
from batch.planning.fingerprint import take_fingerprint
from batch.planning.model_facts import ITEM_BYTES, ModelFacts, read_chat_template, read_config, read_facts
from batch.planning.plan import Plan, cut_shards
from batch.spec import JobSpec
from engine.chat_template import find_template_mistake
from engine.checkpoint.digest import weights_digest
from engine.config import ModelConfig
from engine.errors import CheckpointError, Problem, SpecError
from engine.limits import cache_bytes, find_config_problems, num_cached_tokens
from engine.params import find_unknown_tokens
from engine.remote import ModelFolder
from engine.tokenizer import TOKENIZER_FILES


@dataclass(frozen=True)
class PlannedJob:
    """A job that is ready to run, from its start or from where it was left."""

    spec: JobSpec
    input: InputFiles
    model: ModelFolder
    config: ModelConfig
    facts: ModelFacts
    plan: Plan


def plan_job(spec: JobSpec) -> PlannedJob:
    """Look at the input and the model; write nothing, load nothing.

    Raises UserError where they do not fit the spec.
    """
    files = read_input(spec)
    model = ModelFolder(spec.model.path)
    config = read_config(model)
    facts = read_facts(model, config, spec.model.dtype)
    _check_model(spec, model, config, facts)
    fingerprint = take_fingerprint(
        spec,
        files={file.path: file.identity for file in files.files},
        model={"files": weights_digest(model)},
    )
    shards = cut_shards(((file.path, file.num_rows) for file in files.files), max(1, tokens_per_row(spec)))
    return PlannedJob(spec, files, model, config, facts, Plan(fingerprint, shards))


def _check_model(spec: JobSpec, model: ModelFolder, config: ModelConfig, facts: ModelFacts) -> None:
    """What a worker would find out only once it has loaded the model."""
    if problems := list(_find_problems(spec, config, ITEM_BYTES[facts.dtype])):
        raise SpecError(problems)
    if not any(name in model.files() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{model.path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be in the folder")
    if spec.input.kind == "messages" and spec.template.chat == "auto":
        _check_chat_template(model)
    if spec.workers.accelerator is not None:
        share = 1.0 if spec.workers.gpus == "auto" else spec.workers.gpus
        check_cards(spec, facts, [spec.workers.accelerator], share)


def _find_problems(spec: JobSpec, config: ModelConfig, itemsize: int) -> Iterator[Problem]:
    """What would fail every row, or the engine before the first."""
    engine, longest = spec.engine_config(), config.max_position_embeddings
    if problems := list(find_config_problems(engine, config, itemsize)):
        yield from problems
        return
    if spec.task != "generate":
        return
    for problem in find_unknown_tokens(spec.sampling.model_dump(), config.vocab_size):
        yield Problem(f"sampling.{problem.path}", problem.message)
    if "max_tokens" in spec.sampling.columns:
        return
    room, asked = engine.max_model_len or longest, spec.sampling.max_tokens
    if asked >= room:
        message = f"must leave room for a prompt in the {room:,} tokens that the model holds, is {asked:,}"
        yield Problem("sampling.max_tokens", message)
    shortest, memory = num_cached_tokens(1, asked), engine.kv_cache_memory
    if memory is not None and (least := cache_bytes(shortest, config, itemsize)) > memory:
        message = f"must hold a row with sampling.max_tokens ({asked:,}), {least:,} bytes, is {memory:,}"
        yield Problem("engine.kv_cache_memory", message)


def _check_chat_template(model: ModelFolder) -> None:
    """The checkpoint's own; of one that it does not have prepare tells."""
    name, text = read_chat_template(model) or ("", "")
    if (mistake := find_template_mistake(text)) is not None:
        raise CheckpointError(
            f"{model.path}/{name}: the chat template is no Jinja template: {mistake}; mend it, or give template.chat"
        )


def tokens_per_row(spec: JobSpec) -> int:
    """Most tokens that a row may generate, over its samples; a row with a max_tokens or n of its own may differ."""
    return spec.sampling.max_tokens * spec.sampling.n if spec.task == "generate" else 0
