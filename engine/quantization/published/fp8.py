"""fp8, as AutoFP8 (one scale a weight) and the models with blocks of 128 by 128 (DeepSeek, Qwen) write it."""

from collections.abc import Mapping

from moray.engine.float_dtypes import STORED_FLOATS
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.method import PublishedMethod, scale_shape
from moray.engine.quantization.published.names import path
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored_part import StoredPart


def _read(options: JsonOptions, names: MatrixNames) -> Scheme:
    options.expect_only(
        "quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers",
        "modules_to_convert", "kv_cache_scheme", "fmt", "scale_fmt", "expert_dtype", "dequantize",
    )  # fmt: skip
    options.expect("fmt", "e4m3", "float8_e4m3fn")
    options.expect("scale_fmt", "float", "ue8m0")  # of the activations; the headers say how the weights' are stored
    options.expect("expert_dtype", "fp8")
    options.expect("modules_to_convert", [])
    ignored = options.texts("modules_to_not_convert") + options.texts("ignored_layers")
    rows, group_size = 1, None
    if options.value("weight_block_size") is not None:
        rows, group_size = options.pair("weight_block_size")
    return Scheme(
        "fp8",
        "fp8",
        group_size,
        block_rows=rows,
        is_per_tensor=group_size is None,
        layout="elements",
        ignore=(*map(path, ignored), names.embedding),
        notes=("activations are not quantized as the checkpoint says: they keep the model's dtype",),
    )


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
    scales = scale_shape(scheme, shape)
    name = "weight_scale" if scheme.is_per_tensor else "weight_scale_inv"  # inv or not, codes are multiplied by it
    also = ((),) if scheme.is_per_tensor else ()
    return {"weight": StoredPart(shape, ("F8_E4M3",)), name: StoredPart(scales, STORED_FLOATS, also=also)}


FP8 = PublishedMethod(_read, _parts, lambda scheme: "weight", lambda scheme, stored: stored)
