"""How the model of a job or an endpoint fits GPUs or this machine, from its config and the headers of its weights."""

from collections.abc import Sequence
from dataclasses import replace

from moray.batch.plan.model_info import ModelInfo
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.memory_fit import MemoryFit, SmallerWeights, fit_memory
from moray.engine.float_dtypes import ITEM_BYTES
from moray.engine.partition import SIZES, find_split_problems
from moray.engine.platform.gpu_support import find_capability_problem
from moray.engine.platform.memory import available_bytes

THIS_MACHINE = "this machine"
QUANTIZED_KINDS = ("int8", "int4")  # what to try where a model does not fit: the more accurate first; fp8 is no smaller


def fit_gpu(
    name: str,
    capability: tuple[int, int],
    memory_bytes: int,
    config: EngineConfig,
    model: ModelConfig,
    info: ModelInfo,
    *,
    share: float = 1.0,
) -> MemoryFit:
    """Return how a model fits a GPU, a share of it, or as many of them as the config has ranks.

    memory_bytes: of one GPU
    share:        of a GPU, where a worker has less than a whole one
    """
    ranks = config.tensor_parallel or 1
    refusal = find_capability_problem(capability, info.dtype) or _find_experts_problem(config)
    memory_bytes, config = int(memory_bytes * share), replace(config, device="cuda")
    found = _fit(name, memory_bytes, config, model, info, refusal)
    if found.fits or refusal is not None or share < 1:
        return found
    for size in (size for size in SIZES if size > ranks and info.weights_of_rank(size) is not None):
        if list(find_split_problems(model, size)):  # it can be split by whole experts only
            continue
        if _fit(name, memory_bytes, replace(config, tensor_parallel=size), model, info, None).fits:
            return replace(found, more_gpus=size)
    return found


def _find_experts_problem(config: EngineConfig) -> str | None:
    if config.expert_parallel:
        return "engine.expert_parallel is true, and ranks on GPUs have a part of every expert so far; leave it out"
    return None


def fit_this_machine(config: EngineConfig, model: ModelConfig, info: ModelInfo) -> MemoryFit:
    """Return how a model fits the memory that is free on this machine now, where its CPU computes."""
    return _fit(THIS_MACHINE, available_bytes(), replace(config, device="cpu"), model, info, None)


def _fit(
    name: str, memory_bytes: int, config: EngineConfig, model: ModelConfig, info: ModelInfo, refusal: str | None
) -> MemoryFit:
    """Return how a model fits, with the quantized weights with which it would where it does not."""

    def fit_weights(kind: str | None) -> MemoryFit | None:
        ranks = config.tensor_parallel or 1
        if (num_bytes := info.weights_of_rank(ranks, kind)) is None:
            return None
        return fit_memory(
            name,
            config,
            model,
            weights_bytes=num_bytes if config.device == "cuda" else num_bytes * ranks,
            itemsize=ITEM_BYTES[info.dtype],
            memory_bytes=memory_bytes,
            refusal=refusal,
        )

    found = fit_weights(None)
    assert found is not None, f"a model that {config.tensor_parallel} ranks cannot share is refused before"
    if not found.fits:
        for kind in QUANTIZED_KINDS:
            if (quantized := fit_weights(kind)) is not None and quantized.fits:
                return replace(found, smaller=SmallerWeights(kind, quantized.weights_bytes))
    return found


def explain_misfits(fits: Sequence[MemoryFit], share: float = 1.0) -> str:
    """Return why a model fits none of these GPUs, of those with kernels by the largest one, and what to do."""
    usable = [fit for fit in fits if fit.refusal is None]
    if not usable:
        return f"no kernel runs on these GPUs. {'; '.join(f'{fit.name}: {fit.refusal}' for fit in fits)}"
    largest = max(usable, key=lambda fit: fit.memory_bytes)
    return f"{f'{share:g} of ' if share < 1 else ''}{largest.title}: {largest.explain()}"
