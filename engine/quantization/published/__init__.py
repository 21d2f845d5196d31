"""Checkpoints that are published quantized: the methods that are read, by their quant_method in config.json.

No torch but in unpack.py: plans read configs and headers too.
"""

from dataclasses import replace

from moray.engine.json_options import JsonOptions
from moray.engine.quantization.kv_cache import Published, read_published
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.awq import AWQ
from moray.engine.quantization.published.compressed_tensors import COMPRESSED_TENSORS
from moray.engine.quantization.published.fp8 import FP8
from moray.engine.quantization.published.gptq import GPTQ
from moray.engine.quantization.published.method import PublishedMethod
from moray.engine.quantization.published.mxfp4 import MXFP4
from moray.engine.quantization.scheme import Scheme

GROUP_UNIT = 8  # inputs of a group are a multiple of this: kernels read 8 codes of 4 bits at once

METHODS: dict[str, PublishedMethod] = {
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "gptq": GPTQ,
    "awq": AWQ,
    "mxfp4": MXFP4,
}


def read_scheme(options: JsonOptions, names: MatrixNames) -> Scheme | None:
    """Return the scheme of a quantized checkpoint, or None if its config announces no quantized weights.

    options:  those of config.json; what is not supported is refused in them
    names:    of the family's matrices
    """
    if not options.one_of("quantization_config", "compression_config"):
        return None
    key = _key(options)
    inner = options.inner(key)
    default = "compressed-tensors" if inner.value("config_groups") else None
    method = inner.one_of("quant_method", "method") or default
    if method not in METHODS:
        inner.refuse(
            inner.describe("quant_method"),
            f"{', '.join(METHODS)} (or the model in bfloat16 or float16, with model.quantization)",
        )
        return None
    if (scheme := METHODS[method].read(inner, names)) is None:
        return None
    if not inner.problems and scheme.group_size is not None and scheme.group_size % GROUP_UNIT:
        inner.refuse(f"{key} has groups of {scheme.group_size} inputs", f"multiples of {GROUP_UNIT}")
    return replace(scheme, other_names=(("gate", "router"),))


def read_kv_cache(options: JsonOptions) -> Published | None:
    """Return what config.json says of the KV cache; None = nothing. options: those of config.json"""
    return read_published(options.inner(_key(options)))


def _key(options: JsonOptions) -> str:
    return "quantization_config" if options.value("quantization_config") is not None else "compression_config"
