"""From a spec to all that is decided before anything runs: files, model, fingerprint, shards."""

from dataclasses import dataclass

from batch.fingerprint import take_fingerprint
from batch.input import InputFiles, read_input
from batch.plan import Plan, cut_shards
from batch.spec import JobSpec
from engine.digest import weights_digest
from engine.remote import ModelFolder


@dataclass(frozen=True)
class PlannedJob:
    """A job that is ready to run, from its start or from where it was left."""

    spec: JobSpec
    input: InputFiles
    model: ModelFolder
    plan: Plan


def plan_job(spec: JobSpec) -> PlannedJob:
    """Look at the input and the model; write nothing, load nothing.

    Raises UserError where they do not fit the spec.
    """
    files = read_input(spec)
    model = ModelFolder(spec.model.path)
    fingerprint = take_fingerprint(
        spec,
        files={file.path: file.identity for file in files.files},
        model={"files": weights_digest(model)},
    )
    shards = cut_shards(((file.path, file.num_rows) for file in files.files), tokens_per_row(spec))
    return PlannedJob(spec, files, model, Plan(fingerprint, shards))


def tokens_per_row(spec: JobSpec) -> int:
    """Most tokens that a row may generate, over its samples; a row with a max_tokens or n of its own may differ."""
    return spec.sampling.max_tokens * spec.sampling.n
