"""Load a checkpoint into its model: config, fused parameters, packing for speed."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.checkpoint.weights import Checkpoint
from engine.config import ModelConfig
from engine.device import CPU, Device
from engine.layers.backend import Prepared
from engine.models import ARCHITECTURES, CausalLM
from engine.models.phi_msft import PhiMsftForCausalLM

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: Device = CPU,
) -> CausalLM:
    """Read the weights of `folder` into a model that is ready to run.

    Peak memory is the model plus one layer: each layer's weights are given up as it is packed.
    Raises CheckpointError naming every missing, extra or misshapen tensor.
    """
    build, tensor_map = ARCHITECTURES[config.architecture]
    with _default_dtype(dtype), device.torch:  # weights are read straight to where they stay
        model = build(config)
    report = Checkpoint(folder).load_into(model, tensor_map(config))
    if isinstance(model, PhiMsftForCausalLM):
        model.log_tied_routers()
    started = time.perf_counter()
    for module in model.modules():
        if isinstance(module, Prepared):
            module.prepare(device.backend)
    packing = time.perf_counter() - started
    logger.info("Loaded %.2f GB in %.1f s, packed in %.1f s", report.bytes / 1e9, report.seconds, packing)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in the model's dtype at once: a conversion would touch the memory twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
