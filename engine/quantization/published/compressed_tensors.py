"""compressed-tensors, as llm-compressor writes it: integers of 4 and 8 bits, and fp8.

Source: the compressed-tensors package, whose compressors define what is stored.
"""

import re
from collections.abc import Mapping
from typing import Any

from moray.engine.float_dtypes import ITEM_BYTES, STORED_FLOATS
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.method import (
    PublishedMethod,
    num_groups,
    scale_shape,
)
from moray.engine.quantization.published.names import check_patterns, regular
from moray.engine.quantization.scheme import CODE_BITS, Scheme, WeightKind
from moray.engine.quantization.stored_part import StoredPart

PACKED = "pack-quantized"  # several codes in a word; all other formats have one code in each element
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
KINDS: dict[tuple[str, int], WeightKind] = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}
STRATEGIES = ("tensor", "channel", "group", "block")

# How the config was made, or how other programs run it: they change no weight.
HARMLESS = ("quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize",
            "use_optimized_inference")  # fmt: skip
HARMLESS_IN_WEIGHTS = ("observer", "observer_kwargs", "zp_dtype")


def _read(options: JsonOptions, names: MatrixNames) -> Scheme | None:
    options.expect_only(
        *HARMLESS, "quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config",
        "transform_config", "moe_sparsity_config",
    )  # fmt: skip
    options.expect("transform_config", {})
    options.expect("moe_sparsity_config", {})
    if options.value("sparsity_config"):
        options.inner("sparsity_config").expect("format", "dense")
    groups = [_Group(options, group) for group in _with_weights(options.inner("config_groups"))]
    if not groups and options.value("kv_cache_scheme") is not None:
        return None
    if not groups:
        options.refuse(options.describe("config_groups"), "a group with weights and targets")
        return Scheme("compressed-tensors", "int8")
    first = groups[0]
    for group in groups[1:]:
        if group.fields != first.fields:
            options.refuse(
                f"{group.name} and {first.name} quantize weights differently", "one way for all weights of a model"
            )
    ignore = check_patterns(options, "ignore", tuple(map(_pattern, options.texts("ignore"))))
    return Scheme(
        "compressed-tensors",
        **first.fields,
        ignore=(*ignore, names.embedding),
        targets=tuple(pattern for group in groups for pattern in group.targets) if _have_names(groups) else (),
        notes=_notes(groups),
    )


def _with_weights(groups: JsonOptions) -> list[JsonOptions]:
    """Return the groups that quantize weights; one for attention alone quantizes only what is computed."""
    every = [groups.inner(name) for name in groups.values]
    return [group for group in every if group.value("weights") is not None]


class _Group:
    """Reads one of the config_groups: which modules it means, and the fields of their Scheme."""

    def __init__(self, top: JsonOptions, options: JsonOptions) -> None:
        self.name = options.prefix.rstrip(".")
        options.expect_only("targets", "weights", "input_activations", "output_activations", "format")
        targets = options.texts("targets")
        self.is_all_linear = "Linear" in targets
        if not targets or "Embedding" in targets:
            options.refuse(options.describe("targets"), "Linear, names of linear modules, and re: with an expression")
        self.targets = check_patterns(options, "targets", tuple(map(_pattern, targets)))
        self.has_activations = any(options.value(key) for key in ("input_activations", "output_activations"))
        options.inner("input_activations").expect("num_bits", 8, 16)
        options.inner("output_activations").expect("num_bits", 8, 16)
        self.fields = _read_weights(options.inner("weights"))
        source = top if options.value("format") is None else options
        source.expect("format", *FORMATS)
        self.fields["layout"] = "words" if source.value("format") == PACKED else "elements"
        if source.value("format") == PACKED and self.fields["kind"] == "fp8":
            source.refuse(source.describe("format"), "float-quantized for weights of type float")


def _read_weights(options: JsonOptions) -> dict[str, Any]:
    """Return the fields of the Scheme that the weights of a group have."""
    options.expect_only(
        *HARMLESS_IN_WEIGHTS, "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic",
        "actorder", "scale_dtype",
    )  # fmt: skip
    options.expect("dynamic", False)
    options.expect("actorder", False, "weight", "static")  # others permute the inputs
    options.expect("scale_dtype", *(f"torch.{dtype}" for dtype in ITEM_BYTES))
    number, bits = str(options.value("type") or "int").lower(), options.whole("num_bits", default=8)
    if (number, bits) not in KINDS:
        options.refuse(
            f"{options.prefix}type and num_bits are {number} and {bits}", "int and 4, int and 8, float and 8"
        )
    group_size, rows = options.value("group_size"), 1
    strategy = options.value("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    elif strategy not in STRATEGIES:
        options.refuse(options.describe("strategy"), ", ".join(STRATEGIES))
    size = options.whole("group_size") if strategy == "group" else None
    if strategy == "block":
        rows, size = options.pair("block_structure")
    symmetric = options.value("symmetric") is not False
    if not symmetric and (number == "float" or strategy in ("tensor", "block")):
        options.refuse(f"{options.prefix}symmetric is False", "true, or integers per channel or group")
    return {
        "kind": KINDS.get((number, bits), "int8"),
        "group_size": size,
        "symmetric": symmetric,
        "block_rows": rows,
        "is_per_tensor": strategy == "tensor",
    }


def _pattern(text: str) -> str:
    """Return the pattern for an entry of `ignore` or `targets`: a name, or `re:` and the beginning of one."""
    return regular(text.removeprefix("re:")) if text.startswith("re:") else re.escape(text)


def _have_names(groups: list[_Group]) -> bool:
    return not any(group.is_all_linear for group in groups)


def _notes(groups: list[_Group]) -> tuple[str, ...]:
    if any(group.has_activations for group in groups):
        return ("activations are not quantized as the checkpoint says: they keep the model's dtype",)
    return ()


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
    rows, inputs = shape
    scales = scale_shape(scheme, shape)
    also = ((),) if scales == (1,) else ((rows,),) if scales == (rows, 1) else ()
    parts = {"weight_scale": StoredPart(scales, STORED_FLOATS, also=also)}
    if scheme.layout == "words":
        bits = CODE_BITS[scheme.kind]
        parts["weight_packed"] = StoredPart((rows, -(-inputs * bits // 32)), ("I32",))
        parts["weight_shape"] = StoredPart((2,), ("I64", "I32"))
        if not scheme.symmetric:
            parts["weight_zero_point"] = StoredPart((-(-rows * bits // 32), num_groups(scheme, shape)), ("I32",))
    else:
        dtype = "F8_E4M3" if scheme.kind == "fp8" else "I8"
        parts["weight"] = StoredPart(shape, (dtype,))
        # Older versions store the zero points of symmetric weights too.
        zeros = StoredPart(scales, (dtype, "I8"), is_optional=scheme.symmetric, also=also)
        parts["weight_zero_point"] = zeros
    return parts


def _shape(scheme: Scheme, stored: tuple[int, ...]) -> tuple[int, ...]:
    return (stored[0], stored[1] * 32 // CODE_BITS[scheme.kind]) if scheme.layout == "words" else stored


COMPRESSED_TENSORS = PublishedMethod(
    _read, _parts, lambda scheme: "weight_packed" if scheme.layout == "words" else "weight", _shape
)
