"""StoredFormat: the interface of what a weight file has for a linear weight that is quantized in memory."""

import re
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from moray.engine.quantization.stored_part import StoredPart
from moray.engine.quantization.weight import QuantizedWeight


class StoredFormat(Protocol):
    """Finds a linear module's weight in the weight files, and reads it. A module has its published name.

    extras:           what is found in names of stored tensors that are not used, such as scales of activations; None =
                      nothing
    is_read_by_rows:  the tensors of `parts` have a weight's rows as their first dimension, and some of them make a
                      weight of these rows
    """

    extras: re.Pattern[str] | None
    is_read_by_rows: bool

    def parts(self, module: str, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
        """Return stored name -> tensor, for the module's weight; not for its bias.

        shape: (out_features, in_features)
        """

    def assemble(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight from the tensors of `parts`, in their stored dtypes, on the tensors' device.

        Raises CheckpointError naming the tensor, if its values do not make a weight.
        """
