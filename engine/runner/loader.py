"""Load a checkpoint into its model: build it from the config, read the weights and pack them for the kernels."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.config import ModelConfig
from moray.engine.layers.post_load import process_weights_after_loading
from moray.engine.models import ARCHITECTURES
from moray.engine.models.base import CausalLM

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype, backend: Backend = CPU) -> CausalLM:
    """Load the weights of `folder` into a model that is ready to run.

    Peak memory is the model plus one layer: each layer's weights are freed as the layer is packed.
    Raises CheckpointError naming every missing, extra or misshapen tensor.
    """
    model = build_model(config, dtype, backend)
    report = Checkpoint(folder).load_into(model, model.tensor_map(config))
    model.validate_weights()
    started = time.perf_counter()
    process_weights_after_loading(model, backend)
    packing = time.perf_counter() - started
    logger.info("Loaded %.2f GB in %.1f s, packed in %.1f s", report.bytes / 1e9, report.seconds, packing)
    return model


def build_model(config: ModelConfig, dtype: torch.dtype, backend: Backend = CPU) -> CausalLM:
    """Build a model whose parameters are empty, in the memory where they will stay."""
    with _default_dtype(dtype), backend.torch_device:
        return ARCHITECTURES[config.architecture](config)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in the model's dtype from the start: a later conversion would write the memory twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
