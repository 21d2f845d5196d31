"""Load a checkpoint into its model: build it from the config, read the weights and pack them for the kernels."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.other_names import respell
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.config import ModelConfig
from moray.engine.errors import DeviceError
from moray.engine.layers.linear import Linear
from moray.engine.layers.moe import Experts, SingleExpert
from moray.engine.layers.post_load import process_weights_after_loading
from moray.engine.models import ARCHITECTURES
from moray.engine.models.base import CausalLM
from moray.engine.partition import Rows
from moray.engine.platform.allocator import large_memory_returned
from moray.engine.quantization.published.names import ACTIVATIONS
from moray.engine.runner.kv_scales import load_kv_scales
from moray.engine.runner.quantized_weights import QuantizedWeights

logger = logging.getLogger(__name__)


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend = CPU) -> CausalLM:
    """Load the weights of `folder` into a model that is ready to run: of a rank, those that it has; no others are read.

    Peak memory is the model plus one layer: each layer's weights are freed as the layer is packed. Of weights that are
    quantized in memory, no more than two experts are there in another form at a time.

    Raises CheckpointError naming every missing, extra or misshapen tensor, and DeviceError if the device has no kernels
    for the kind of weights.
    """
    check_quantization(config, backend)
    tensor_map = ARCHITECTURES[config.architecture].tensor_map(config)
    checkpoint = Checkpoint(folder)
    checkpoint.tensors = split_stacks(checkpoint.tensors, config.architecture)
    if config.quantization is not None and config.quantization.is_published:
        names = FAMILIES[config.architecture].other_names
        checkpoint.tensors, scheme = respell(checkpoint.tensors, config.quantization, names)
        config = replace(config, quantization=scheme)
    quantized = QuantizedWeights(config.quantization, tensor_map)
    model = build_model(config, dtype, backend)
    plain = {name: target for name, target in tensor_map.items() if target.param not in quantized.params}
    report = checkpoint.load_into(
        model,
        plain,
        later=quantized.parts,
        extras=ACTIVATIONS if config.published_kv_cache is not None else quantized.extras,
        held=held_rows_of(model),
        experts=_held_experts(model, config.num_experts),
    )
    model.validate_weights()
    started = time.perf_counter()
    with large_memory_returned() if quantized.params else nullcontext():
        process_weights_after_loading(model, backend, quantized.packers(model, checkpoint))
    if config.kv_cache is not None and config.kv_cache.is_stored:
        load_kv_scales(model, checkpoint, config)
    packing = time.perf_counter() - started
    logger.info("Loaded %.2f GB in %.1f s, packed in %.1f s", report.bytes / 1e9, report.seconds, packing)
    if config.quantization is not None:
        logger.info("Weights of experts and attention are %s", config.quantization.label)
        for note in config.quantization.notes:
            logger.warning("%s: %s", folder, note)
    if config.kv_cache is None and config.published_kv_cache is not None:
        logger.warning("%s: the KV cache is not quantized as kv_cache_scheme says: it keeps the model's dtype", folder)
    return model


def check_quantization(config: ModelConfig, backend: Backend) -> None:
    """Raise DeviceError if the device has no kernels for the model's kind of quantized weights."""
    if config.quantization is not None and (kind := config.quantization.kind) not in backend.quantized_formats:
        others = ", ".join(backend.quantized_formats) or "none"
        raise DeviceError(
            f"{backend.device_name} ({backend.name}) has no kernels for {kind} weights; it has: {others}."
        )


def build_model(config: ModelConfig, dtype: torch.dtype, backend: Backend = CPU) -> CausalLM:
    """Build a model whose parameters are empty, in the memory where they will stay.

    Weights that will be quantized get no memory: they are parameters on the meta device.
    """
    architecture = ARCHITECTURES[config.architecture]
    quantized = QuantizedWeights(config.quantization, architecture.tensor_map(config))
    with _default_dtype(dtype), backend.torch_device:
        model = architecture(config, backend.communicator.partition)
        for name, param in list(model.named_parameters()):
            if param.is_meta and name not in quantized.params:
                owner, _, attribute = name.rpartition(".")
                allocated = nn.Parameter(torch.empty(param.shape), requires_grad=False)
                setattr(model.get_submodule(owner), attribute, allocated)
    return model


def held_rows_of(model: nn.Module) -> dict[str, Rows]:
    """Return name of a parameter -> the rows of it, of each expert, that this rank has, if it does not have all."""
    held = {}
    for name, _ in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, Experts | Linear) and not (rows := layer.held_rows(attribute)).is_whole:
            held[name] = rows
    return held


def _held_experts(model: nn.Module, num_experts: int) -> dict[str, range]:
    """Return name of a parameter -> the experts of it that this rank has, of those of which it does not have all."""
    return {
        f"{name}.{attribute}": layer.held
        for name, layer in model.named_modules()
        if isinstance(layer, Experts) and not isinstance(layer, SingleExpert) and len(layer.held) < num_experts
        for attribute, _ in layer.named_parameters()
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in the model's dtype from the start: a later conversion would write the memory twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
