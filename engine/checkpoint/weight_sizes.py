"""Measure a model's weights from the headers of its files: how many there are, and their memory. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.other_names import respell
from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.config import ModelConfig
from moray.engine.partition import SIZES, Partition, find_split_problems
from moray.engine.quantization.matrix_names import Split
from moray.engine.quantization.published import METHODS
from moray.engine.quantization.published.names import ACTIVATIONS
from moray.engine.quantization.scheme import Scheme


@dataclass(frozen=True)
class WeightSizes:
    """States how many weights a model has, and the bytes that they take in memory.

    num_parameters: as published before quantization: scales and zero points are not counted
    rank_bytes:     number of ranks that the model can be split among -> bytes of one rank's part
    """

    num_parameters: int
    num_bytes: int
    rank_bytes: Mapping[int, int]


def measure_weights(tensors: Mapping[str, StoredTensor], config: ModelConfig, itemsize: int) -> WeightSizes:
    """Measure the weights of a model in memory.

    tensors:   the stored tensors, whatever they are stored as
    itemsize:  bytes of a weight that is not quantized
    """
    partitions = [Partition(0, size) for size in SIZES if _can_be_split(config, size)]
    matrices = {name.rpartition(".")[0] for name, tensor in tensors.items() if len(tensor.shape) > 1}
    names = FAMILIES[config.architecture].names
    scheme, num_parameters, num_bytes = config.quantization, 0, dict.fromkeys((part.size for part in partitions), 0)
    if scheme is not None and scheme.is_published:
        tensors, scheme = respell(tensors, scheme, FAMILIES[config.architecture].other_names)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        is_counted = scheme is not None and scheme.is_published and _goes_with_codes(scheme, module, part)
        if ACTIVATIONS.search(name) or is_counted:
            continue  # its bytes are few, or counted with the codes
        if scheme is None or part == "bias" or len(tensor.shape) < 2 or not scheme.quantizes(module):
            is_code, shape = False, tensor.shape
        elif scheme.is_published:
            is_code, shape = True, METHODS[scheme.method].shape(scheme, tensor.shape)
        else:
            is_code, shape = part == "weight", tensor.shape
        num_parameters += math.prod(shape)
        split = names.split(module) if module in matrices else "whole"  # a norm's weight is whole, too
        for partition in partitions:
            rows, columns = _num_rows(shape[0], split, config, partition), math.prod(shape[1:])
            if is_code and scheme is not None:
                num_bytes[partition.size] += scheme.weight_bytes(rows, columns)
            else:
                num_bytes[partition.size] += rows * columns * itemsize
    return WeightSizes(num_parameters, num_bytes[1], num_bytes)


def _can_be_split(config: ModelConfig, size: int) -> bool:
    return any(not list(find_split_problems(config, size, expert_parallel=whole)) for whole in (False, size > 1))


def _num_rows(total: int, split: Split, config: ModelConfig, partition: Partition) -> int:
    """Return how many rows of a matrix, or of its bias, a rank has; each rank has as many. total: of all ranks"""
    match split:
        case "whole":
            return total
        case "if even":
            return len(partition.split_if_even(total))
        case "keys or values":
            return partition.num_kv_heads(config) * config.head_dim
        case "qkv":
            return len(partition.split_qkv(config))
        case "equally":
            return -(-total // partition.size)  # where this is uneven, ranks have whole experts


def _goes_with_codes(scheme: Scheme, module: str, part: str) -> bool:
    """Return whether a stored tensor is a scale or the like of a weight."""
    is_code = part in ("bias", METHODS[scheme.method].codes(scheme))
    return not is_code and part != "weight" and scheme.quantizes(module)
