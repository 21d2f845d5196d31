"""Rename stored tensors that a program for quantization spelled as its own modules, not as the model is published.

No torch: plans read headers too.
"""

from collections.abc import Mapping
from dataclasses import replace

from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.quantization.scheme import Scheme


def respell(
    tensors: Mapping[str, StoredTensor], scheme: Scheme, other_names: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], Scheme]:
    """Return the tensors by their published names, and the scheme, which knows the names that its config may use.

    other_names: part of a name between dots -> the published one
    """
    renamed: dict[str, StoredTensor] = {}
    found = dict[str, str]()
    for name, tensor in tensors.items():
        parts = name.split(".")
        found |= {other_names[part]: part for part in parts if part in other_names}
        published = ".".join(other_names.get(part, part) for part in parts)
        renamed[published] = replace(tensor, name=published)
    return renamed, replace(scheme, other_names=tuple((dict(scheme.other_names) | found).items()))
