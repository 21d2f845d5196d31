"""Measure a model's weights from the headers of its files: how many there are, and their memory. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.other_names import respell
from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.config import ModelConfig
from moray.engine.quantization.published import METHODS
from moray.engine.quantization.published.names import ACTIVATIONS
from moray.engine.quantization.scheme import Scheme


@dataclass(frozen=True)
class WeightSizes:
    """States how many weights a model has, and the bytes that they take in memory.

    num_parameters: as published before quantization: scales and zero points are not counted
    """

    num_parameters: int
    num_bytes: int


def measure_weights(tensors: Mapping[str, StoredTensor], config: ModelConfig, itemsize: int) -> WeightSizes:
    """Measure the weights of a model in memory.

    tensors:   the stored tensors, whatever they are stored as
    itemsize:  bytes of a weight that is not quantized
    """
    scheme, num_parameters, num_bytes = config.quantization, 0, 0
    if scheme is not None and scheme.is_published:
        tensors, scheme = respell(tensors, scheme, FAMILIES[config.architecture].other_names)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if scheme is not None and scheme.is_published and _goes_with_codes(scheme, module, part):
            continue  # its bytes are counted with the codes
        if scheme is None or part == "bias" or len(tensor.shape) != 2 or not scheme.quantizes(module):
            is_code, shape = False, tensor.shape
        elif scheme.is_published:
            is_code, shape = True, METHODS[scheme.method].shape(scheme, tensor.shape)
        else:
            is_code, shape = part == "weight", tensor.shape
        num_parameters += math.prod(shape)
        if is_code and scheme is not None:
            num_bytes += scheme.weight_bytes(shape[0], shape[1])
        else:
            num_bytes += math.prod(shape) * itemsize
    return WeightSizes(num_parameters, num_bytes)


def _goes_with_codes(scheme: Scheme, module: str, part: str) -> bool:
    """Return whether a stored tensor is a scale or the like: of activations, or of a weight."""
    is_code = part in ("bias", METHODS[scheme.method].codes(scheme))
    return ACTIVATIONS.search(f".{part}") is not None or (not is_code and part != "weight" and scheme.quantizes(module))
