"""How quantized weights are written: as compressed-tensors publishes them, so that other programs read them too.

int8: int-quantized; fp8: float-quantized; int4: pack-quantized, eight codes in a word, low bits first, each 8 more than
it is. Scales are exact: bfloat16 for int4, whose scales are rounded to that, else float32.
"""

from typing import Any

import torch
from torch import Tensor

from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.scheme import CODE_BITS, Scheme, WeightKind
from moray.engine.quantization.weight import QuantizedWeight

FORMATS: dict[WeightKind, str] = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
CODES_PER_WORD = 8


def written_shapes(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return suffix of the stored name -> dtype and shape, of a weight [out_features, in_features]."""
    rows, inputs = shape
    groups = -(-inputs // (scheme.group_size or inputs))
    if scheme.kind == "int4":
        return {
            "weight_packed": ("I32", (rows, -(-inputs // CODES_PER_WORD))),
            "weight_scale": ("BF16", (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
    return {"weight": ("I8" if scheme.kind == "int8" else "F8_E4M3", shape), "weight_scale": ("F32", (rows, groups))}


def written_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return suffix of the stored name -> tensor, of a weight that was quantized on load."""
    if weight.kind == "int4":
        scales = weight.scales.bfloat16()
        return {
            "weight_packed": _pack_words(weight.codes),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
    return {"weight": weight.codes, "weight_scale": weight.scales}


def _pack_words(codes: Tensor) -> Tensor:
    """Pack codes of 4 bits into int32, eight in a word. codes: [out_features, in_features] int8"""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % CODES_PER_WORD))
    above = (padded + 8).view(torch.uint8)
    return (above[:, 0::2] | above[:, 1::2] << 4).view(torch.int32)


def written_config(scheme: Scheme, names: MatrixNames) -> dict[str, Any]:
    """Return what config.json has as quantization_config."""
    weights = {
        "num_bits": CODE_BITS[scheme.kind],
        "type": "float" if scheme.kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme.kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [names.head.replace("\\", ""), f"re:{names.router}$"],
        "kv_cache_scheme": None,
    }
