"""MXFP4, as OpenAI writes gpt-oss: e2m1 in groups of 32 inputs, whose scale is a power of two, for experts alone.

Format: OCP Microscaling Formats (MX) Specification 1.0. Two codes are in a byte, and a scale is one, its exponent.
"""

from collections.abc import Mapping

from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.method import PublishedMethod
from moray.engine.quantization.published.names import path
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored_part import StoredPart

GROUP_SIZE = 32
BLOCK_BYTES = GROUP_SIZE // 2  # of a group's codes


def _read(options: JsonOptions, names: MatrixNames) -> Scheme:
    options.expect_only("quant_method", "modules_to_not_convert", "dequantize")
    options.expect("dequantize", False)
    return Scheme(
        "mxfp4",
        "fp4",
        GROUP_SIZE,
        layout="blocks",
        ignore=(*names.patterns, *map(path, options.texts("modules_to_not_convert"))),
        targets=(r".*\.experts\.\d+\.[^.]+",),
    )


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
    rows, groups = shape[0], -(-shape[1] // GROUP_SIZE)
    return {"blocks": StoredPart((rows, groups, BLOCK_BYTES), ("U8",)), "scales": StoredPart((rows, groups), ("U8",))}


def _shape(scheme: Scheme, stored: tuple[int, ...]) -> tuple[int, ...]:
    return stored[0], stored[1] * GROUP_SIZE


MXFP4 = PublishedMethod(_read, _parts, lambda scheme: "blocks", _shape)
