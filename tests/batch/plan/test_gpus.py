"""Whether a model fits a GPU: the plan, the start of a run and the endpoint answer by one rule."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from made_jobs import TINY, make_spec, write_input
from repository import CONFIGS

from moray.batch.plan.gpus import GPU_MODELS, RAY_NAMES, check_gpus, fit_job
from moray.batch.plan.model_fit import THIS_MACHINE, fit_gpu
from moray.batch.plan.model_info import ModelInfo
from moray.batch.plan.planner import plan_job
from moray.batch.spec import JobSpec
from moray.engine.checkpoint.model_config import parse_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.checkpoint.weight_sizes import WeightSizes, measure_weights
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.errors import NodeError, SpecError
from moray.engine.models import ARCHITECTURES
from moray.engine.platform.gpu_support import MIN_CAPABILITY
from moray.engine.quantization.scheme import ON_LOAD_KINDS, OnLoadKind
from moray.engine.settings.sizes import GIB
from moray.jobs.commands import serve
from moray.jobs.doctor.nvml import Driver, NvmlGpu
from moray.serve.args import EndpointArgs

PHI = parse_model_config(json.loads((CONFIGS / "phi-3.5-moe/config.json").read_text()), {}, "phi")
MIXTRAL = parse_model_config(json.loads((CONFIGS / "mixtral-8x7b/config.json").read_text()), {}, "mixtral")
FACTS = ModelInfo("phimoe", 41_873_153_344, 16, 2, "bfloat16", 83_746_306_688, 131_072, 131_072)
SMALL = replace(FACTS, weights_bytes=GIB)
SHORT = {"max_model_len": 8192}


def check(spec: JobSpec, candidates: list[str | None], facts: ModelInfo = FACTS) -> None:
    check_gpus(spec, PHI, facts, candidates)


def test_a_model_that_fits_no_candidate(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as wrong:
        check(make_spec(tmp_path), ["A100", "L4"])
    assert str(wrong.value) == (
        "workers.accelerator: A100: 78.0 GiB of weights and about 1.5 GiB of working memory leave room for 3,840 "
        "tokens of KV cache in 80.0 GiB, and a sequence may have 131,072; lower model.max_model_len or use a larger GPU"
    )
    half: dict[str, Any] = {"workers": {"gpus": 0.5}, "engine": {"kv_cache_memory": "1GiB"}}
    with pytest.raises(SpecError, match=r"0.5 of H200: .* do not fit into 70.2 GiB; use a larger GPU or a smaller"):
        check(make_spec(tmp_path, **half), ["H200"])


@pytest.mark.parametrize("sections", [{"workers": {"gpus": 2}}, {"engine": {"tensor_parallel": 2}}])
def test_several_gpus_of_a_worker_hold_what_one_does_not(tmp_path: Path, sections: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"A100: .* or split it among 2 GPUs \(engine.tensor_parallel\), or set"):
        check(make_spec(tmp_path, model=SHORT), ["A100"], facts=made_info(PHI))
    spec = make_spec(tmp_path, model=SHORT, **sections)
    check(spec, ["A100"], facts=made_info(PHI))
    with pytest.raises(SpecError, match=r"2 x L4: 39.1 GiB of weights on each and about .* among 4 GPUs"):
        check(spec, ["L4"], facts=made_info(PHI))


def test_numbers_of_gpus_side_by_side(tmp_path: Path) -> None:
    spec, info = make_spec(tmp_path, model=SHORT), made_info(PHI)
    fits = fit_job(spec, PHI, info, ["A100", "A100-40G"], [2, 4])
    assert [(fit.title, fit.fits) for fit in fits] == [
        ("2 x A100", True), ("2 x A100-40G", False), ("4 x A100", True), ("4 x A100-40G", True),
    ]  # fmt: skip
    with pytest.raises(SpecError, match="--gpus: must be 1, 2, 4 or 8, is 3"):
        fit_job(spec, PHI, info, ["A100"], [3])
    with pytest.raises(SpecError, match="--gpus: is a number of GPUs of a model; give that with --gpu"):
        fit_job(spec, PHI, info, (), [2])
    with pytest.raises(
        SpecError, match=r"--gpus: is 8, which does not divide this model's .*\(num_attention_heads\) 36"
    ):
        fit_job(spec, replace(PHI, num_heads=36), info, ["A100"], [8])


def test_experts_are_not_whole_on_gpus_yet(tmp_path: Path) -> None:
    whole = {"tensor_parallel": 2, "expert_parallel": True}
    with pytest.raises(SpecError, match=r"A100: engine.expert_parallel is true, .*; leave it out"):
        check(make_spec(tmp_path, model=SHORT, engine=whole), ["A100"], facts=made_info(PHI))


def test_an_endpoint_needs_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NvmlGpu("A100", (8, 0), 80 * GIB, 80 * GIB)
    monkeypatch.setattr(serve, "working_driver", lambda: Driver("580", (13, 0), (gpu, gpu)))

    def check_args(ranks: int) -> None:
        args = EndpointArgs.model_validate({"model": "m", "tensor_parallel": ranks, **SHORT})
        serve.check_gpu(args, PHI, made_info(PHI))

    check_args(2)
    with pytest.raises(NodeError, match=r"tensor_parallel is 4, and each rank needs a GPU of its own; .* has 2\."):
        check_args(4)
    with pytest.raises(NodeError, match=r"A100: 78.0 GiB of weights .* or split it among 2 GPUs"):
        check_args(1)


@pytest.mark.parametrize(
    ("model", "gpu", "fixes", "gpus", "smaller"),
    [
        (PHI, "A100", "lower model.max_model_len or use a larger GPU", 2, ("int8", 39.3)),
        (PHI, "A100-40G", "use a larger GPU or a smaller model", 4, ("int4", 21.1)),
        (MIXTRAL, "A100", "use a larger GPU or a smaller model", 2, ("int8", 43.8)),
        (MIXTRAL, "L4", "use a larger GPU or a smaller model", 8, None),
    ],
)
def test_more_gpus_and_quantization_are_fixes_where_the_model_would_fit(
    tmp_path: Path, model: ModelConfig, gpu: str, fixes: str, gpus: int, smaller: tuple[OnLoadKind, float] | None
) -> None:
    (fit,) = fit_job(make_spec(tmp_path, model=SHORT), model, made_info(model), [gpu])
    fixes += f", or split it among {gpus} GPUs (engine.tensor_parallel)"
    if smaller is not None:
        kind, gib = smaller
        fixes += f", or set model.quantization: {kind}, which needs {gib} GiB for the weights"
        assert round(made_info(with_quantization(model, kind, "model")).weights_bytes / GIB, 1) == gib
    assert not fit.fits and fit.explain().rpartition("; ")[2] == fixes


def test_quantization_is_no_fix_of_quantized_weights(tmp_path: Path) -> None:
    model = with_quantization(PHI, "int8", "model")
    (fit,) = fit_job(make_spec(tmp_path, model=SHORT), model, made_info(model), ["A100-40G"])
    assert "model.quantization" not in fit.explain() and fit.explain().endswith("2 GPUs (engine.tensor_parallel)")


@pytest.mark.parametrize("names", [["V100"], ["T4"], ["K80", "P4", "P100", "T4"]])
def test_gpus_that_no_kernel_runs_on(tmp_path: Path, names: list[str | None]) -> None:
    spec = make_spec(tmp_path, model={"max_model_len": 100})
    with pytest.raises(SpecError, match=r"no kernel runs on these GPUs\. \w+: it has compute capability \d\.\d"):
        check(spec, names, facts=SMALL)
    check(spec, [*names, "L4"], facts=SMALL)
    if "T4" in names:
        check(spec, names, facts=replace(SMALL, dtype="float16"))


def test_the_old_gpus_of_the_table_are_there_to_be_refused() -> None:
    old = {gpu.ray_name for gpu in GPU_MODELS if gpu.capability < MIN_CAPABILITY}
    assert old == {"K80", "P4", "P100", "V100"}


@cache
def made_info(config: ModelConfig) -> ModelInfo:
    """The facts of a published model of this config in bfloat16, from the names and shapes of its tensors alone."""
    tensors = {
        name: StoredTensor(name, "model.safetensors", "BF16", target.shape, 0, 0)
        for name, target in ARCHITECTURES[config.architecture].tensor_map(config).items()
    }
    sizes = measure_weights(tensors, config, 2)
    quantized: dict[str, WeightSizes] = {}
    if config.quantization is None:
        configs = {kind: with_quantization(config, kind, "model") for kind in ON_LOAD_KINDS}
        quantized = {kind: measure_weights(tensors, one, 2) for kind, one in configs.items()}
    label = None if config.quantization is None else config.quantization.label
    return replace(
        FACTS,
        num_parameters=sizes.num_parameters,
        weights_bytes=sizes.num_bytes,
        quantization=label,
        quantized_weights_bytes={kind: sizes.num_bytes for kind, sizes in quantized.items()},
        rank_weights_bytes=sizes.rank_bytes,
        quantized_rank_weights_bytes={kind: sizes.rank_bytes for kind, sizes in quantized.items()},
    )


# Phi-3.5-MoE, by hand: its 512 experts have 3 x 6,400 x 4,096 weights, an attention layer 2 x 4,096 x 4,096 and
# 2 x 1,024 x 4,096; a scale has 4 bytes.
EXPERTS, ATTENTION = 512 * 3 * 6400 * 4096, 32 * (2 * 4096 + 2 * 1024) * 4096
ROWS = 512 * (2 * 6400 + 4096) + 32 * (2 * 4096 + 2 * 1024)
REST = 2 * (41_873_153_344 - EXPERTS - ATTENTION)


@pytest.mark.parametrize(
    ("kind", "num_bytes", "gigabytes"),
    [
        (None, 2 * 41_873_153_344, 83.7),
        ("int8", EXPERTS + ATTENTION + 4 * ROWS + REST, 42.2),
        ("fp8", EXPERTS + ATTENTION + 4 * ROWS + REST, 42.2),
        ("int4", (EXPERTS + ATTENTION) // 2 + (EXPERTS + ATTENTION) // 128 * 4 + REST, 22.6),
    ],
)
def test_bytes_of_quantized_weights(kind: OnLoadKind | None, num_bytes: int, gigabytes: float) -> None:
    info = made_info(with_quantization(PHI, kind, "phi"))
    assert (info.num_parameters, info.weights_bytes) == (41_873_153_344, num_bytes)
    assert round(num_bytes / 1e9, 1) == gigabytes
    assert info.types == ("bfloat16" if kind is None else f"{kind}/1 and bfloat16")


@pytest.mark.parametrize(
    ("model", "kind", "fitting"),
    [
        (PHI, None, {"H200", "H20", "H100", "B200", "RTX-PRO-6000"}),  # of those called H100, the one with 94 GB
        (PHI, "int8", {"A100", "A100-80G", "H100", "H200", "H20", "B200", "L40S", "RTX-PRO-6000"}),
        (PHI, "int4", {"A100", "A100-40G", "A100-80G", "H100", "H200", "H20", "B200", "L40S", "RTX-PRO-6000"}),
        (MIXTRAL, None, {"H200", "H20", "RTX-PRO-6000", "H100", "B200"}),
        (MIXTRAL, "int8", {"A100", "A100-80G", "H100", "H200", "H20", "B200", "RTX-PRO-6000"}),
        (MIXTRAL, "int4", {"A100", "A100-40G", "A100-80G", "H100", "H200", "H20", "B200", "L40S", "RTX-PRO-6000"}),
    ],
)
def test_quantized_weights_fit_smaller_gpus(
    tmp_path: Path, model: ModelConfig, kind: OnLoadKind | None, fitting: set[str]
) -> None:
    spec = make_spec(tmp_path, model=SHORT | {"quantization": kind})
    model = with_quantization(model, kind, "model")
    fits = {name: fit_job(spec, model, made_info(model), [name]) for name in RAY_NAMES}
    assert {name for name, found in fits.items() if any(fit.fits for fit in found)} == fitting


def test_one_that_fits_or_cannot_be_known(tmp_path: Path) -> None:
    names: list[str | None]
    for names in (["H200"], ["A100", "H200"], ["A100", None], ["Intel-GAUDI"], []):
        check(make_spec(tmp_path), names)
    check(make_spec(tmp_path, model={"max_model_len": 3456}), ["A100"])


@pytest.mark.parametrize("model", [{}, SHORT])
@pytest.mark.parametrize("name", RAY_NAMES)
def test_plan_run_and_endpoint_give_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: dict[str, Any]
) -> None:
    spec = make_spec(tmp_path, model=model)
    sizes = [gpu for gpu in GPU_MODELS if gpu.ray_name == name]
    planned = any(fit.fits for fit in fit_job(spec, PHI, FACTS, [name]))
    gpus = tuple(NvmlGpu(gpu.name, gpu.capability, gpu.memory_bytes, gpu.memory_bytes) for gpu in sizes)
    monkeypatch.setattr(serve, "working_driver", lambda: Driver("580", (13, 0), gpus))

    def accepts(call: Any, *arguments: Any) -> bool:
        try:
            call(*arguments)
        except (SpecError, NodeError):
            return False
        return True

    assert accepts(check, spec, [name]) == planned
    args = EndpointArgs.model_validate({"model": "m", **model})
    assert accepts(serve.check_gpu, args, PHI, FACTS) == planned
    assert accepts(serve.check_gpu, args.model_copy(update={"device": "cpu"}), PHI, FACTS)


def test_a_name_of_several_sizes(tmp_path: Path) -> None:
    fits = fit_job(make_spec(tmp_path, model=SHORT), PHI, FACTS, ["H100"])
    assert [(fit.name, fit.fits) for fit in fits] == [("H100", False), ("H100 NVL", True)]


def test_a_cache_of_a_given_size(tmp_path: Path) -> None:
    """A worker that shares a GPU must give its size; rows that it does not hold fail one by one."""
    spec = make_spec(tmp_path, workers={"gpus": 0.65}, engine={"kv_cache_memory": "8GiB"})
    assert not fit_gpu("H200", (9, 0), 91 * GIB, EngineConfig(), PHI, FACTS).fits
    check(spec, ["H200"])
    assert [fit.fits for fit in fit_job(spec, PHI, FACTS, ["H200", "A100"])] == [True, False]


def test_gpus_by_name_or_this_machine(tmp_path: Path) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    job = plan_job(make_spec(tmp_path))

    def fit(*names: str, **sections: Any) -> list[Any]:
        return fit_job(make_spec(tmp_path, **sections), job.config, job.model_info, names)

    (here,) = fit()
    assert here.name == THIS_MACHINE and here.working_bytes == 0 and here.fits
    h200, l4 = fit("H200", "L4")
    assert (h200.name, l4.name) == ("H200", "L4") and h200.fits and l4.fits
    assert h200.memory_bytes == 143771 << 20 and h200.working_bytes > GIB
    shared: dict[str, Any] = {"workers": {"gpus": 0.5}, "engine": {"kv_cache_memory": "1GiB"}}
    assert fit("L4", **shared)[0].memory_bytes == l4.memory_bytes // 2
    assert fit(**shared) == []
    assert fit(workers={"accelerator": "L4"})[0].name == "L4"
    with pytest.raises(SpecError, match="--gpu: 'H10' is not known; did you mean 'H100'"):
        fit("H10")
    assert job.model.path == str(TINY)
