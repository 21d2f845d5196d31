"""How the model of a job or an endpoint fits a GPU or this machine, from its config and the headers of its weights."""

from collections.abc import Sequence
from dataclasses import replace

from moray.batch.plan.model_info import ITEM_BYTES, ModelInfo
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.memory_fit import MemoryFit, SmallerWeights, fit_memory
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
) -> MemoryFit:
    """Return how a model fits a GPU, or a share of it.

    memory_bytes: of the GPU, or of the share
    """
    refusal = find_capability_problem(capability, info.dtype)
    return _fit(name, "cuda", memory_bytes, config, model, info, refusal)


def fit_this_machine(config: EngineConfig, model: ModelConfig, info: ModelInfo) -> MemoryFit:
    """Return how a model fits the memory that is free on this machine now, where its CPU computes."""
    return _fit(THIS_MACHINE, "cpu", available_bytes(), config, model, info, None)


def _fit(
    name: str,
    device: str,
    memory_bytes: int,
    config: EngineConfig,
    model: ModelConfig,
    info: ModelInfo,
    refusal: str | None,
) -> MemoryFit:
    def fit_weights(num_bytes: int) -> MemoryFit:
        return fit_memory(
            name,
            replace(config, device=device),
            model,
            weights_bytes=num_bytes,
            itemsize=ITEM_BYTES[info.dtype],
            memory_bytes=memory_bytes,
            refusal=refusal,
        )

    found = fit_weights(info.weights_bytes)
    if not found.fits:
        for kind in QUANTIZED_KINDS:
            if (num_bytes := info.quantized_weights_bytes.get(kind)) is not None and fit_weights(num_bytes).fits:
                return replace(found, smaller=SmallerWeights(kind, num_bytes))
    return found


def explain_misfits(fits: Sequence[MemoryFit], share: float = 1.0) -> str:
    """Return why a model fits none of these GPUs, of those with kernels by the largest one, and what to do."""
    usable = [fit for fit in fits if fit.refusal is None]
    if not usable:
        return f"no kernel runs on these GPUs. {'; '.join(f'{fit.name}: {fit.refusal}' for fit in fits)}"
    largest = max(usable, key=lambda fit: fit.memory_bytes)
    return f"{'' if share == 1 else f'{share:g} of '}{largest.name}: {largest.explain()}"
