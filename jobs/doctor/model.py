"""Check a model: that it can be read, fits into the memory, and fits on the disk where it is downloaded."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moray.batch.units import memory, short, size
from moray.engine.errors import CheckpointError, NodeError
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.gpu import working_driver
from moray.jobs.doctor.places import access_fix, free_bytes, nearest_folder

if TYPE_CHECKING:
    from moray.engine.checkpoint.model_source import ModelSource
    from moray.engine.config import ModelConfig


def checkpoint(subject: Subject) -> Iterator[Finding]:
    """Read the model's config and the headers of its weights."""
    if subject.model is None:
        return
    from moray.batch.plan.model_info import read_model_info
    from moray.engine.checkpoint.model_source import ModelSource

    fix = access_fix(subject.model, "read")
    try:
        folder = ModelSource(subject.model)
        if folder.files():  # it can be reached, so any further error is about its files
            fix = "name a checkpoint that moray runs, whole and as it was published: docs/checkpoints.md"
        info = read_model_info(folder, _config(subject, folder), _dtype(subject))
    except (CheckpointError, NodeError) as error:
        is_unreachable = isinstance(error, NodeError)  # the store or the hub failed halfway
        yield problem(" ".join(str(error).split()), access_fix(subject.model, "read") if is_unreachable else fix)
        return
    yield ok(
        f"{subject.model}: {info.architecture}, {short(info.num_parameters)} parameters, "
        f"{memory(info.weights_bytes)} as {info.types}"
    )


def room(subject: Subject) -> Iterator[Finding]:
    """Check that weights and the KV cache of one sequence fit into the first GPU, or as many as a worker has, or into
    this machine's memory."""
    if subject.model is None:
        return
    from moray.batch.plan.lengths import engine_config_for
    from moray.batch.plan.model_fit import fit_gpu, fit_this_machine
    from moray.batch.plan.model_info import read_model_info
    from moray.engine.checkpoint.model_source import ModelSource
    from moray.engine.config import EngineConfig
    from moray.engine.partition import find_split_problems

    spec = subject.spec
    if spec is not None and spec.workers.accelerator is not None:
        yield ok(f"the spec asks for a GPU of type {spec.workers.accelerator}; moray plan checks whether it is enough")
        return
    try:
        folder = ModelSource(subject.model)
        config = _config(subject, folder)
        info = read_model_info(folder, config, _dtype(subject))
    except (CheckpointError, NodeError):  # checkpoint() reports it
        return
    driver = None if spec is not None and spec.workers.gpus == 0 else working_driver()
    engine = EngineConfig() if spec is None else engine_config_for(spec)
    ranks = engine.tensor_parallel or 1
    if problems := list(find_split_problems(config, ranks, expert_parallel=engine.expert_parallel)):
        yield problem("; ".join(map(str, problems)), "set engine.tensor_parallel and workers.gpus to such a number")
        return
    if driver is None:
        fit = fit_this_machine(engine, config, info)
    else:
        gpu = driver.gpus[0]
        if ranks > len(driver.gpus):
            fix = "lower workers.gpus or engine.tensor_parallel, or plan with moray plan --gpu for another machine"
            yield problem(f"each worker uses {ranks} GPUs, and this machine has {len(driver.gpus)}", fix)
            return
        share = 1.0 if spec is None else min(1.0, spec.gpus_per_worker(has_gpus=True))
        fit = fit_gpu(gpu.name, gpu.capability, gpu.total_bytes, engine, config, info, share=share)
    if fit.fits:
        cache = f"{memory(fit.cache_bytes)} of KV cache, {fit.cache_tokens:,} tokens"
        yield ok(f"{fit.title}, {memory(fit.memory_bytes)}: {memory(fit.weights_bytes)} of weights, {cache}")
    else:
        reason, _, fix = fit.explain().rpartition("; ")
        yield problem(f"{fit.title}: {reason}", fix)


def download(subject: Subject) -> Iterator[Finding]:
    """Compare a remote model with the disk that it is downloaded to."""
    if subject.model is None or "://" not in subject.model:
        return
    from moray.engine.checkpoint.model_source import ModelSource

    try:
        model = ModelSource(subject.model)
        files = model.files()
        needed = sum(files[name] for name in [*model.metadata_files(), *model.weight_files()])
    except (CheckpointError, NodeError):
        return
    cache = _download_folder(subject.model)
    free, _ = free_bytes(nearest_folder(cache))
    value = f"{size(needed)} to {cache}, whose disk has {size(free)} free"
    if free < needed:
        variable = "HF_HOME" if subject.model.startswith("hf://") else "XDG_CACHE_HOME"
        yield warning(
            f"{value}: too little unless the model is there already", f"export {variable}=FOLDER on a larger disk"
        )
    else:
        yield ok(value)


def _download_folder(model: str) -> Path:
    from moray.kernels.cache_root import cache_root

    if not model.startswith("hf://"):
        return cache_root()
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.path.expanduser(HF_HUB_CACHE))


def _config(subject: Subject, folder: "ModelSource") -> "ModelConfig":
    from moray.batch.plan.model_info import read_config

    if subject.spec is None:
        return read_config(folder)
    engine = subject.spec.engine_config()
    return read_config(folder, engine.quantization, engine.kv_cache_dtype)


def _dtype(subject: Subject) -> str:
    return "auto" if subject.spec is None else subject.spec.model.dtype
