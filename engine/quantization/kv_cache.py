"""How keys and values are quantized in the KV cache, and what checkpoints publish of that. No torch: plans ask too."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from moray.engine.json_options import JsonOptions

KvCacheDtype = Literal["model", "fp8"]  # what may be asked for: the dtype of the model, or e4m3 with scales
KV_CACHE_DTYPES: tuple[KvCacheDtype, ...] = get_args(KvCacheDtype)
Published = Literal["fp8", "other"]  # what a config says of the cache: e4m3 with static scales, or something else
CALIBRATION_VERSION = 1  # of the tokens and of the arithmetic by which scales are chosen, see runner/kv_scales.py

# Scales of keys and values, as compressed-tensors, AutoFP8, ModelOpt and vLLM call them.
_SCALE = re.compile(
    r".*\.(?P<layer>\d+)\.\w*attn\w*(?:\.(?:attn|[kv]_proj|qkv_proj))?\.(?P<part>kv|k|v)_scale"
    r"|.*\.(?P<of_output>\d+)\.\w*attn\w*\.(?P<output>[kv])_proj\.output_scale"
)


@dataclass(frozen=True)
class KvCacheScheme:
    """States that keys and values are stored as e4m3, with a scale for each layer and KV head.

    is_stored:  the scales are in the checkpoint; else they are calibrated when the model is loaded
    """

    is_stored: bool = False

    @property
    def label(self) -> str:
        """Return the format and the version of its scales, which are part of a job's fingerprint: "fp8/1", or "fp8"."""
        return "fp8" if self.is_stored else f"fp8/{CALIBRATION_VERSION}"


def read_published(quantization: JsonOptions) -> Published | None:
    """Return what the quantization_config of a checkpoint says of the KV cache; None = nothing."""
    scheme = quantization.value("kv_cache_scheme")
    if scheme is None:
        return None
    if scheme == "static":
        return "fp8"  # AutoFP8
    if not isinstance(scheme, dict) or (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
        return "other"
    return "other" if scheme.get("dynamic") or scheme.get("symmetric") is False else "fp8"


def find_scales(names: Iterable[str]) -> dict[tuple[int, str], str]:
    """Return (layer, "k" or "v") -> the name of the stored tensor with the scales. One may be of both."""
    found: dict[tuple[int, str], str] = {}
    for name in names:
        if match := _SCALE.fullmatch(name):
            layer, part = match["layer"] or match["of_output"], match["part"] or match["output"]
            found |= {(int(layer), one): name for one in part}
    return found
