"""Open a model: choose the device, start the ranks, load the weights, and divide what memory is left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moray.engine.backends.base import Backend
from moray.engine.backends.choose import choose_backend
from moray.engine.backends.formats import TORCH_DTYPES
from moray.engine.checkpoint.kv_cache import with_kv_cache
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import EngineConfig, KeptTokens, ModelConfig
from moray.engine.core.limits import BLOCK_SIZE, Limits, choose_graphs, choose_largest_step, choose_limits
from moray.engine.errors import CheckpointError
from moray.engine.models.base import CausalLM
from moray.engine.partition import find_split_problems
from moray.engine.runner.model_runner import ModelRunner
from moray.engine.runner.ranks import Ranks
from moray.engine.text.tokenizer import Tokenizer, has_tokenizer


@dataclass(frozen=True)
class OpenModel:
    """Holds a model that is ready to run.

    folder:     its files on this machine
    dtype:      of its activations, and of the weights that are not quantized
    tokenizer:  None where the folder has none
    backend:    the device of rank 0
    ranks:      the processes of the other ranks, if there are any
    limits:     of the KV cache, which is allocated, and of the steps
    """

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    backend: Backend
    ranks: Ranks
    runner: ModelRunner
    limits: Limits


def open_model(
    model_path: str, config: EngineConfig, *, load: Callable[..., CausalLM], ranks: Ranks | None = None
) -> OpenModel:
    """Open a model; the arguments and errors are those of Engine."""
    backend = choose_backend(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    size = config.tensor_parallel or 1
    split = size, config.expert_parallel
    assert ranks is None or (ranks.size, ranks.expert_parallel) == split, f"other ranks than {split}"
    folder = ModelSource(model_path).download()
    model_config = with_quantization(read_model_config(folder), config.quantization, model_path)
    model_config = with_kv_cache(model_config, config.kv_cache_dtype, ModelSource(str(folder)).tensors, model_path)
    dtype = TORCH_DTYPES[model_config.dtype if config.dtype == "auto" else config.dtype]
    backend.check_dtype(dtype)
    tokenizer = _load_tokenizer(folder, model_config, config.special_tokens)
    if problems := list(find_split_problems(model_config, size, expert_parallel=config.expert_parallel)):
        raise CheckpointError("; ".join(map(str, problems)))
    is_alone = config.kv_cache_memory is None  # with a fixed size, other processes may share the GPU
    if is_alone:
        backend.wait_for_memory()
    ranks = ranks or Ranks(size, backend, config.num_threads, expert_parallel=config.expert_parallel)
    if size > 1:
        backend = ranks.backend
        torch.set_num_threads(ranks.num_threads)
    parts = ranks.open(load, folder, model_config, dtype, BLOCK_SIZE, wait_for_memory=is_alone)
    model = load(folder, model_config, dtype, backend)
    parts.wait_until_loaded()
    runner = ModelRunner(model, model_config, dtype, block_size=BLOCK_SIZE, backend=backend, send=parts.send)
    limits = _allocate_within_limits(runner, config)
    return OpenModel(folder, model_config, dtype, tokenizer, backend, ranks, runner, limits)


def _allocate_within_limits(runner: ModelRunner, config: EngineConfig) -> Limits:
    """Choose the limits, and allocate the KV cache and graphs in the memory that a step leaves.

    The scales of a quantized cache are chosen before.
    """
    runner.calibrate_cache()
    itemsize, model, backend = runner.dtype.itemsize, runner.config, runner.backend
    backend.free_cached_memory()  # of loading
    largest_step = choose_largest_step(
        config, model, itemsize=itemsize, available_bytes=backend.available_bytes, device=backend.name
    )
    available_bytes = runner.measure_available(*largest_step)
    limits = choose_limits(
        config,
        model,
        itemsize=itemsize,
        available_bytes=available_bytes,
        device=backend.name,
        largest_step=largest_step,
    )
    runner.allocate_cache(limits.num_blocks)
    step = limits.max_num_seqs, limits.max_num_batched_tokens
    graphs = choose_graphs(
        config, model, *step, itemsize=itemsize, available_bytes=available_bytes, device=backend.name
    )
    if graphs is not None:
        runner.capture_graphs(graphs)
    runner.warm_up()
    runner.expert_load.reset()  # the warm-up and the measured step are not load
    return limits


def _load_tokenizer(folder: Path, config: ModelConfig, special_tokens: KeptTokens) -> Tokenizer | None:
    """Load the folder's tokenizer, or return None if it has none: requests of token ids need no tokenizer."""
    if not has_tokenizer(folder):
        return None
    ends = config.eos_token_ids, config.generation_eos_token_ids
    return Tokenizer(folder, *ends, special_tokens=special_tokens)
