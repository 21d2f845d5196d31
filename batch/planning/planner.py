"""From a spec to all that is decided before anything runs: files, model, fingerprint, shards."""

from dataclasses import dataclass

from batch.input import InputFiles, read_input
from batch.placement.cards import check_cards
from batch.planning.fingerprint import take_fingerprint
from batch.planning.model_facts import ModelFacts, read_config, read_facts
from batch.planning.plan import Plan, cut_shards
from batch.spec import JobSpec
from engine.checkpoint.digest import weights_digest
from engine.config import ModelConfig
from engine.errors import CheckpointError, Problem, SpecError
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
    _check_model(spec, model, facts)
    fingerprint = take_fingerprint(
        spec,
        files={file.path: file.identity for file in files.files},
        model={"files": weights_digest(model)},
    )
    shards = cut_shards(((file.path, file.num_rows) for file in files.files), max(1, tokens_per_row(spec)))
    return PlannedJob(spec, files, model, config, facts, Plan(fingerprint, shards))


def _check_model(spec: JobSpec, model: ModelFolder, facts: ModelFacts) -> None:
    """What a worker would find out only once it has loaded the model."""
    longest, context = spec.model.max_model_len, facts.max_position_embeddings
    if longest is not None and longest > context:
        message = f"must be at most the model's context (max_position_embeddings), {context:,}, is {longest:,}"
        raise SpecError([Problem("model.max_model_len", message)])
    room, asked = longest or context, spec.sampling.max_tokens
    if spec.task == "generate" and "max_tokens" not in spec.sampling.columns and asked >= room:
        message = f"must leave room for a prompt in the {room:,} tokens that the model holds, is {asked:,}"
        raise SpecError([Problem("sampling.max_tokens", message)])
    if not any(name in model.files() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{model.path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be in the folder")
    if spec.workers.accelerator is not None:
        share = 1.0 if spec.workers.gpus == "auto" else spec.workers.gpus
        check_cards(spec, facts, [spec.workers.accelerator], share)


def tokens_per_row(spec: JobSpec) -> int:
    """Most tokens that a row may generate, over its samples; a row with a max_tokens or n of its own may differ."""
    return spec.sampling.max_tokens * spec.sampling.n if spec.task == "generate" else 0
