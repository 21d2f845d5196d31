"""Split stored tensors that hold something of every expert of a layer into the tensors of each expert.

Everything after it, such as loading a rank's rows or quantizing on load, knows tensors of single experts alone. No
torch: plans read headers too.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.families.family import Stack
from moray.engine.checkpoint.weight_files import Place, StoredTensor


def split_stacks(tensors: Mapping[str, StoredTensor], architecture: str) -> dict[str, StoredTensor]:
    """Return the tensors by name; of a stack, [num_experts, ..], those of its experts. The family names them."""
    split: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for stack in FAMILIES[architecture].stacks:
            found = re.fullmatch(stack.pattern, name)
            if found and len(tensor.shape) >= (3 if stack.are_columns else 2):
                split |= {own.name: own for own in _of_experts(tensor, stack, found)}
                break
        else:
            split[name] = tensor
    return split


def _of_experts(tensor: StoredTensor, stack: Stack, found: re.Match[str]) -> Iterator[StoredTensor]:
    num_experts, *shape = tensor.shape
    rows, columns = (shape[1], shape[:1]) if stack.are_columns else (shape[0], shape[1:])
    step = len(stack.names)
    for expert in range(num_experts):
        whole = tensor.rows(slice(expert, expert + 1))
        for first, template in enumerate(stack.names):
            own = len(range(first, rows, step)), *columns
            place = Place(first, step, rows, stack.are_columns) if stack.are_columns or step > 1 else None
            yield replace(whole, name=found.expand(template.format(expert)), shape=own, place=place)
