"""GPU models by Ray's names, with compute capability and memory: which of them a model fits, before anything runs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moray.batch.ledger import Counts
from moray.batch.plan.lengths import NOTHING, engine_config_for
from moray.batch.plan.model_fit import explain_misfits, fit_gpu, fit_this_machine
from moray.batch.plan.model_info import ModelInfo
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.memory_fit import MemoryFit
from moray.engine.errors import Problem, SpecError
from moray.engine.partition import SIZES, find_split_problems
from moray.engine.settings.problems import nearest


@dataclass(frozen=True)
class GpuModel:
    """Describes a model of GPU. Its memory is in MiB as nvidia-smi shows it, which is less than the data sheet's GB
    where ECC has no memory chips of its own.

    ray_name:    its name in Ray, which several models may share
    capability:  compute capability, major and minor
    """

    ray_name: str
    name: str
    capability: tuple[int, int]
    memory_mib: int

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20


# Names that are missing are not checked. Those that no kernel runs on are here so that they are refused.
GPU_MODELS = (
    GpuModel("K80", "K80", (3, 7), 11441),
    GpuModel("P4", "P4", (6, 1), 7680),
    GpuModel("P100", "P100", (6, 0), 16384),
    GpuModel("V100", "V100", (7, 0), 16384),
    GpuModel("T4", "T4", (7, 5), 15360),
    GpuModel("L4", "L4", (8, 9), 23034),
    GpuModel("A10G", "A10G", (8, 6), 23028),
    GpuModel("L40S", "L40S", (8, 9), 46068),
    GpuModel("A100", "A100", (8, 0), 81920),
    GpuModel("A100-40G", "A100-40G", (8, 0), 40960),
    GpuModel("A100-80G", "A100-80G", (8, 0), 81920),
    GpuModel("H100", "H100", (9, 0), 81559),
    GpuModel("H100", "H100 NVL", (9, 0), 95830),
    GpuModel("H20", "H20", (9, 0), 97871),
    GpuModel("H20", "H20 141 GB", (9, 0), 143771),
    GpuModel("H200", "H200", (9, 0), 143771),
    GpuModel("RTX-PRO-6000", "RTX-PRO-6000", (12, 0), 97887),
    GpuModel("B200", "B200", (10, 0), 183359),
)
RAY_NAMES = tuple(dict.fromkeys(gpu.ray_name for gpu in GPU_MODELS))


def fit_job(
    spec: JobSpec,
    model: ModelConfig,
    info: ModelInfo,
    names: Sequence[str] = (),
    numbers: Sequence[int] = (),
    committed: Mapping[int, Counts] = NOTHING,
) -> list[MemoryFit]:
    """Return how a job's model fits a worker's GPUs, or its share of one, for each GPU and number of them.

    names:    Ray's names of GPUs; none = the spec's, or this machine's memory where the spec names none
    numbers:  GPUs of a worker; none = the spec's
    committed: counts of the shards that earlier runs have finished, by shard

    Raises SpecError for a GPU whose memory is not known, and where the model cannot be split among so many.
    """
    if problems := list(_find_number_problems(spec, model, names, numbers)):
        raise SpecError(problems)
    if not names and spec.workers.accelerator in RAY_NAMES:
        names = (str(spec.workers.accelerator),)
    if unknown := [name for name in names if name not in RAY_NAMES]:
        raise SpecError([Problem("--gpu", f"{unknown[0]!r} is not known{nearest(unknown[0], RAY_NAMES)}")])
    config = engine_config_for(spec, committed)
    if not names and spec.workers.accelerator is None and spec.workers.gpus in ("auto", 0):
        return [fit_this_machine(config, model, info)]
    share = spec.gpus_per_worker(has_gpus=True) or 1.0
    return [fit for number in numbers or (share,) for fit in _fit_names(config, model, info, names, number)]


def _find_number_problems(
    spec: JobSpec, model: ModelConfig, names: Sequence[str], numbers: Sequence[int]
) -> Iterator[Problem]:
    if numbers and not names and spec.workers.accelerator is None:
        yield Problem("--gpus", "is a number of GPUs of a model; give that with --gpu")
    for number in numbers:
        if number not in SIZES:
            yield Problem("--gpus", f"must be 1, 2, 4 or 8, is {number}")
        else:
            yield from (Problem("--gpus", problem.message) for problem in find_split_problems(model, number))


def _fit_names(
    config: EngineConfig, model: ModelConfig, info: ModelInfo, names: Collection[str], gpus: float
) -> list[MemoryFit]:
    """Return how a model fits a worker's GPUs, or a share of one where `gpus` is less than 1."""
    config = replace(config, tensor_parallel=max(1, int(gpus)))
    return [
        fit_gpu(gpu.name, gpu.capability, gpu.memory_bytes, config, model, info, share=min(gpus, 1.0))
        for name in names
        for gpu in GPU_MODELS
        if gpu.ray_name == name
    ]


def check_gpus(spec: JobSpec, model: ModelConfig, info: ModelInfo, candidates: Collection[str | None]) -> None:
    """Raise SpecError where the model fits a worker's GPUs of no candidate.

    candidates:  names of the GPU models that a worker may get; where one is not known, nothing is refused
    """
    names = sorted(name for name in candidates if name in RAY_NAMES)
    if not names or len(names) < len(candidates):
        return
    gpus = spec.gpus_per_worker(has_gpus=True)
    fits = _fit_names(engine_config_for(spec), model, info, names, gpus)
    if not any(fit.fits for fit in fits):
        raise SpecError([Problem("workers.accelerator", explain_misfits(fits, gpus))])
