"""Check stored tensors against what a model needs, and find matrices that are quantized in part. No torch.

The loader checks all of a model's tensors. A plan has the names and types in the headers, and not the shapes that a
model's code gives; it finds with the same rules, and says in the same words, what is wrong with the quantization.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.other_names import respell
from moray.engine.checkpoint.weight_files import StoredTensor, by_number, list_names
from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError
from moray.engine.float_dtypes import WIDER_STORED_FLOATS
from moray.engine.quantization.published import METHODS
from moray.engine.quantization.published.names import ACTIVATIONS
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored_part import StoredPart

WEIGHT = "weight"
# Tables and masks in older files, which the model computes itself.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.\w+|masked_bias|causal_mask|attn\.bias)$")


def check_tensors(
    tensors: Mapping[str, StoredTensor], parts: Mapping[str, StoredPart], extras: re.Pattern[str] | None, where: str
) -> None:
    """Raise CheckpointError naming every tensor that is missing, extra, misshapen or of a wrong type.

    tensors:  what is stored, by name
    parts:    stored name -> tensor, of what the model has
    extras:   what is found in names of stored tensors that the model does not use; None = nothing
    where:    the folder, for the error
    """
    stored = {name: tensor for name, tensor in tensors.items() if name in parts}
    misshapen = [
        f"{name} {list(tensor.shape)}, must be {list(parts[name].shape)}"
        for name, tensor in stored.items()
        if not parts[name].fits(tensor.shape)
    ]
    wrongly_typed: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in parts[name].dtypes:
            wrongly_typed.setdefault(", ".join(parts[name].dtypes), []).append(f"{name} {tensor.dtype}")
    unknown = [
        name
        for name in tensors.keys() - stored.keys()
        if not IGNORED.search(name) and not (extras and extras.search(name))
    ]
    problems = (
        list_names("Missing", (name for name, part in parts.items() if not part.is_optional and name not in stored))
        + list_names("Not of this model", unknown)
        + list_names("Of another shape", misshapen)
        + "".join(list_names(f"Of a dtype other than {dtypes}", names) for dtypes, names in wrongly_typed.items())
    )
    if problems:
        raise CheckpointError(f"The weights in {where} do not fit its config.json.{problems}")


def check_multiplied_together(scheme: Scheme, groups: Mapping[str, Iterable[str]]) -> None:
    """Raise CheckpointError if some modules of a group are quantized and others are not.

    groups: any key -> published names of modules whose weights one kernel multiplies
    """
    for modules in sorted((sorted(group, key=by_number) for group in groups.values()), key=lambda g: by_number(g[0])):
        quantized = [module for module in modules if scheme.quantizes(module)]
        if 0 < len(quantized) < len(modules):
            plain = next(module for module in modules if module not in quantized)
            raise CheckpointError(
                f"{plain}.{WEIGHT} is not quantized, but {quantized[0]} is, and one kernel multiplies both; use a "
                "checkpoint in which both are quantized, or neither."
            )


def check_quantized(tensors: Mapping[str, StoredTensor], config: ModelConfig, where: str) -> None:
    """Check from the headers alone that a published quantized checkpoint is stored as its config says.

    tensors:  every stored tensor by name
    where:    the folder, for errors

    Raises CheckpointError as the loader does, except for shapes, which the loader alone knows.
    """
    scheme = config.quantization
    if scheme is None or not scheme.is_published:
        return
    family = FAMILIES[config.architecture]
    tensors, scheme = respell(tensors, scheme, family.other_names)
    codes = METHODS[scheme.method].codes(scheme)
    matrices: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in (codes, WEIGHT) and len(tensor.shape) > 1:
            matrices[module] = tensor.shape
    groups: dict[str, list[str]] = {}
    for module in matrices:
        for pattern in family.names.multiplied_together:
            if found := re.fullmatch(pattern, module):
                groups.setdefault(f"{pattern} {found[1]}", []).append(module)
    check_multiplied_together(scheme, groups)
    parts: dict[str, StoredPart] = {}
    for module, shape in matrices.items():
        parts |= _parts_of(scheme, module, shape)
    parts = {
        name: replace(part, shape=tensors[name].shape) if name in tensors else part for name, part in parts.items()
    }
    of_matrices = {name: tensor for name, tensor in tensors.items() if _is_part(name, matrices)}
    check_tensors(of_matrices, parts, ACTIVATIONS, where)


def _parts_of(scheme: Scheme, module: str, shape: tuple[int, ...]) -> dict[str, StoredPart]:
    """Return what is stored of a matrix; a bias of the model is no part of it. shape: of what is stored"""
    if not scheme.quantizes(module):
        return {f"{module}.{WEIGHT}": StoredPart(shape, WIDER_STORED_FLOATS)}
    rows, inputs = METHODS[scheme.method].shape(scheme, shape)
    parts = METHODS[scheme.method].parts(scheme, (rows, inputs))
    return {f"{module}.{suffix}": part for suffix, part in parts.items() if suffix != "bias"}


def _is_part(name: str, matrices: Mapping[str, object]) -> bool:
    module, _, part = name.rpartition(".")
    return module in matrices and part != "bias"
