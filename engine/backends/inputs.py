"""ModelInputs: the tensors of one step, which a model is called with."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelInputs:
    """Holds the tokens of all scheduled sequences, one sequence after the other.

    input_ids, positions, rope_sets:  [num_tokens] int64
    attention:   where this step's keys are written, and which keys each token attends to; each backend has a class of
                 its own for it, which models and layers only pass on
    num_tokens:  [1] int32, number of real tokens; the rows after them are padding. None = no padding
    """

    input_ids: Tensor
    positions: Tensor
    rope_sets: Tensor
    attention: Any
    num_tokens: Tensor | None = None
