"""StoredFormat: the interface of what a weight file has for a linear weight that is quantized in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moray.engine.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class StoredPart:
    """What one stored tensor must be.

    shape:        its shape
    dtypes:       the names that its dtype may have in a safetensors file, such as "BF16" and "F8_E4M3"
    is_optional:  the file need not have it
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


class StoredFormat(Protocol):
    """Finds a linear module's weight in the weight files, and reads it. A module has its published name."""

    def parts(self, module: str, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
        """Return stored name -> tensor, for the module's weight; not for its bias.

        shape: (out_features, in_features)
        """

    def assemble(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight from the tensors of `parts`, in their stored dtypes, on the tensors' device.

        Raises CheckpointError naming the tensor, if its values do not make a weight.
        """
