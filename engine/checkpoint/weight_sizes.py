"""Measure a model's weights from the headers of its files: how many there are, and their memory. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.quantization.scheme import Scheme

SUFFIX = ".weight"


@dataclass(frozen=True)
class WeightSizes:
    """How many weights a model has, and the bytes that they take in memory.

    num_parameters: as published before quantization: scales and zero points are not counted
    """

    num_parameters: int
    num_bytes: int


def measure_weights(tensors: Mapping[str, StoredTensor], scheme: Scheme | None, itemsize: int) -> WeightSizes:
    """Measure the weights of a model in memory.

    scheme:    how weights of linear layers are quantized in memory; None = not
    itemsize:  bytes of a weight that is not quantized
    """
    num_parameters, num_bytes = 0, 0
    for name, tensor in tensors.items():
        numel = math.prod(tensor.shape)
        num_parameters += numel
        is_matrix = name.endswith(SUFFIX) and len(tensor.shape) == 2
        if scheme is not None and is_matrix and scheme.quantizes(name.removesuffix(SUFFIX)):
            num_bytes += scheme.weight_bytes(tensor.shape[0], tensor.shape[1])
        else:
            num_bytes += numel * itemsize
    return WeightSizes(num_parameters, num_bytes)
