"""Split stored tensors that hold a matrix of every expert of a layer into one tensor for each expert.

Everything after it, such as loading a rank's rows or quantizing on load, knows matrices of single experts alone. No
torch: plans read headers too.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.weight_files import StoredTensor


def split_stacks(tensors: Mapping[str, StoredTensor], architecture: str) -> dict[str, StoredTensor]:
    """Return the tensors by name; of a stack, `NAME.weight` [num_experts, ..], those of its experts, `NAME.E.weight`.

    Which tensors are stacks, the family says.
    """
    pattern = FAMILIES[architecture].stacks
    if pattern is None:
        return dict(tensors)
    split: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or not re.fullmatch(pattern, name):
            split[name] = tensor
            continue
        module, _, part = name.rpartition(".")
        for expert in range(tensor.shape[0]):
            own = f"{module}.{expert}.{part}"
            split[own] = replace(tensor.rows(slice(expert, expert + 1)), name=own, shape=tensor.shape[1:])
    return split
