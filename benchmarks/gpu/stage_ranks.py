"""Compare a model split among ranks with the same model on one: its answers and, with several GPUs, its speed.

With several GPUs the gathers of a step are timed alone, too.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch

from gpu.checks_engine import LAYERS, all_prompts, generate, share_unlike
from gpu.checks_kernels import checked
from gpu.gathers import NCCL, time_gathers
from gpu.loads import Load
from gpu.models import NAMES, folder, random_model
from gpu.ours import decode
from gpu.setup import NO_TIME, Row, Setup
from moray.engine.backends.base import Backend
from moray.engine.backends.choose import DEVICES, choose_backend
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.partition import SIZES
from moray.engine.request import Completion
from moray.engine.runner.ranks import Ranks

WEIGHTS = (None, "int4")
DECODE = (1, 32, 256)
PROMPT, STEPS = 512, 32
GATHERS_S = 120.0  # after which ranks that hang in a gather are ended
MIN_S = 15  # seconds that must be left to begin with another number of ranks
MEMORY_SHARE = 0.8  # of one GPU, for the weights of the model whose speed is measured


def run(setup: Setup) -> Iterator[Row]:
    backend = _backend(setup)
    num_gpus = torch.cuda.device_count()
    sizes = [size for size in SIZES if 1 < size <= (max(4, num_gpus) if num_gpus == 1 else num_gpus)] or [2]
    alone = cache(partial(_generate, setup, ranks=None))
    for size in sizes:
        labels = {
            weights: f"{NAMES[0]} {weights or 'bf16'}, tokens and logprobs: {size} ranks equal one"
            for weights in WEIGHTS
        }
        labels = {weights: label for weights, label in labels.items() if setup.find(check=label) is None}
        if not labels or setup.find(check=f"{size} ranks") is not None:
            continue
        if setup.seconds_left < MIN_S and not setup.is_dry:
            yield {"check": f"{size} ranks", "ok": None, "error": NO_TIME}
            continue
        try:
            ranks = Ranks(size, backend)
        except Exception as raised:
            yield {"check": f"{size} ranks", "ok": False, "raised": f"{type(raised).__name__}: {str(raised)[:500]}"}
            continue
        for weights, label in labels.items():
            yield checked(label, partial(_unlike, setup, weights, ranks, alone), 0)
        ranks.close()
    if num_gpus > 1 or setup.is_dry:
        yield from _speeds(setup, backend, sizes)
        yield from _gathers(setup, sizes)


def _backend(setup: Setup) -> Backend:
    """Return what the ranks run on: a GPU each, or all on one."""
    if setup.is_dry:
        from gpu.dry_gpu import DryBackend

        dry = DryBackend(setup.device)
        DEVICES["cuda"] = DEVICES["cuda"]._replace(open=lambda: dry)  # for the engine with one rank
        return dry
    if torch.cuda.device_count() > 1:
        return choose_backend("cuda")
    from gpu.shared_gpu import SharedGpuBackend

    return SharedGpuBackend(choose_backend("cuda").torch_device)


def _unlike(setup: Setup, weights: Any, ranks: Ranks, alone: Callable[[Any], dict[int, Completion]]) -> float:
    return share_unlike(_generate(setup, weights, ranks), alone(weights))


def _generate(setup: Setup, weights: Any, ranks: Ranks | None) -> dict[int, Completion]:
    config = EngineConfig(quantization=weights, max_num_seqs=64, max_model_len=512, kv_cache_memory=1 << 30)
    if setup.is_dry:
        config = replace(config, max_num_seqs=4, kv_cache_memory=1 << 22)
    engine = _engine(setup, config, ranks, None if setup.is_dry else LAYERS)
    prompts = all_prompts(setup)
    return generate(engine, {i: prompts[i][:20] for i in (0, 1)} if setup.is_dry else prompts)


def _engine(setup: Setup, config: EngineConfig, ranks: Ranks | None, layers: int | None) -> Engine:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    path = str(folder(NAMES[0], layers, is_tiny=setup.is_dry))
    config = replace(config, device="cuda", tensor_parallel=1 if ranks is None else ranks.size)
    return Engine(path, config, load=random_model, ranks=ranks)


def _speeds(setup: Setup, backend: Backend, sizes: list[int]) -> Iterator[Row]:
    """Decode with one rank and with each number of ranks, all with the layers that fit into one GPU."""
    layers = None if setup.is_dry else _layers_in_one_gpu()
    loads = [Load("decode", 2, 5, 2, 150)] if setup.is_dry else [Load("decode", n, PROMPT, STEPS) for n in DECODE]
    alone: dict[Load, float] = {}  # measured in the same call, in which the clocks are the same
    labels = {size: f"moray, {size} rank{'s' if size > 1 else ''}" for size in (1, *sizes)}
    if all(setup.find(engine=label, kind="decode") is not None for label in labels.values()):
        return
    for size in (1, *sizes):
        if setup.seconds_left < MIN_S and not setup.is_dry:
            yield {"engine": labels[size], "error": NO_TIME}
            continue
        config = EngineConfig(
            max_num_seqs=max(load.num_sequences for load in loads),
            max_model_len=max(load.longest for load in loads),
            kv_cache_memory=1 << 22 if setup.is_dry else None,
        )
        ranks = None if size == 1 else Ranks(size, backend)
        engine = _engine(setup, config, ranks, layers)
        for load in loads:
            answer = decode(engine, load)
            alone.setdefault(load, answer.tokens_per_s)
            row = {"engine": labels[size], "model": NAMES[0], "layers": layers, **asdict(load)}
            row |= {"tokens_per_s": answer.tokens_per_s, "ms_per_step": answer.ms}
            yield row | {"times one rank": answer.tokens_per_s / alone[load]}
        del engine
        if ranks is not None:
            ranks.close()


def _gathers(setup: Setup, sizes: list[int]) -> Iterator[Row]:
    """Time gathers among each number of ranks. Rows of a number come together, so that none is measured twice."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for size in sizes:
        if setup.find(gather=NCCL, ranks=size) is not None:
            continue
        if setup.seconds_left < MIN_S and not setup.is_dry:
            yield {"gather": NCCL, "ranks": size, "error": NO_TIME}
            continue
        yield from list(time_gathers(size, GATHERS_S, is_dry=setup.is_dry))


def _layers_in_one_gpu() -> int:
    """Return how many of the model's layers fit into one GPU."""
    config = read_model_config(folder(NAMES[0]))
    layer_bytes = 6 * config.num_experts * config.hidden_size * config.intermediate_size  # most of it
    room = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory
    return min(config.num_layers, int(room // layer_bytes))
