"""PublishedMethod: how one method of quantization describes itself in config.json, and names what it stores.

No torch: plans read configs and headers too. What reads the tensors is in unpack.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored_part import StoredPart


@dataclass(frozen=True)
class PublishedMethod:
    """Reads one quant_method.

    read:    returns the scheme, from the options of quantization_config, in which it refuses what is not supported;
             None = no weights are quantized
    parts:   returns suffix of the stored name -> tensor, for a weight of a shape (out_features, in_features)
    codes:   the suffix of the tensor that holds a weight's codes
    shape:   returns the shape of a weight from the shape of the tensor that holds its codes
    """

    read: Callable[[JsonOptions, MatrixNames], Scheme | None]
    parts: Callable[[Scheme, tuple[int, int]], Mapping[str, StoredPart]]
    codes: Callable[[Scheme], str]
    shape: Callable[[Scheme, tuple[int, ...]], tuple[int, ...]]


def scale_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a weight's scales, stored next to the weight: [1], or a row for each block of rows.

    shape: (out_features, in_features)
    """
    if scheme.is_per_tensor:
        return (1,)
    return -(-shape[0] // scheme.block_rows), num_groups(scheme, shape)


def num_groups(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Return how many groups of inputs a weight of this shape has."""
    return -(-shape[1] // (scheme.group_size or shape[1]))
