"""What the engine is measured on: models, formats, settings and loads, the most important first: time may run out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu.features import available_features
from gpu.loads import Load
from gpu.model_formats import BF16, model_formats
from gpu.models import NAMES

PROMPT, OUTPUT, STEPS = 512, 256, 32
SHORT_PROMPT = 256  # of the loads as large as the engine's own limits, which then fit into the KV cache until all run
DECODE = (32, 256, 1, 512, 128, 8)
QUANTIZED_DECODE = (1, 32, 256)
FEW = (1, 32)
MIXED = (128, 512)
FEWEST = 256  # sequences of the smallest of these loads: what a GPU had before it chose its limits itself
MIN_S = 20  # seconds that must be left to begin a load
PLAIN, OWN_LIMITS, EAGER = "moray", "moray, its own limits", "moray without CUDA graphs"


@dataclass(frozen=True)
class Measured:
    """Describes an engine and its loads.

    loads: none = those as large as the limits that the engine chooses
    """

    label: str
    loads: tuple[Load, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of EngineConfig: one engine runs all loads, and captures and reserves for the largest."""
        if not self.loads:
            return {"max_model_len": 2 * (PROMPT + OUTPUT), **self.options}
        most = max(load.num_sequences for load in self.loads)
        return {"max_num_seqs": most, "max_model_len": max(n.longest for n in self.loads), **self.options}


def models(*, is_dry: bool = False) -> list[tuple[str, str]]:
    """Return models with the format of their weights: first those of which figures are published."""
    phi, phixtral, mixtral, qwen3, gpt_oss = NAMES
    formats = [name for name in model_formats(is_dry=is_dry) if not is_dry or name != "fp8_fp8"]  # not on the CPU
    best = "fp8" if "fp8" in formats else "int8"
    first = [(phi, BF16), (mixtral, best), (gpt_oss, BF16), (qwen3, BF16), *((phi, name) for name in formats)]
    return [*first, (gpt_oss, "int4"), (qwen3, best), (phixtral, BF16), (mixtral, BF16)]


def plan(name: str, weights: str, *, is_dry: bool = False) -> list[Measured]:
    """Return a model's engines."""
    phi, phixtral, mixtral, *_ = NAMES
    features = available_features() if (name, weights) == (phi, BF16) else {}
    if is_dry:
        tiny = Load("decode", 3, 20, 3, 150), Load("mixed", 2, 20, 4, 150)
        others = [Measured(f"moray with {feature}", tiny, options) for feature, options in features.items()]
        if (name, weights) == (phi, BF16):
            others.append(Measured(OWN_LIMITS, (), {"kv_cache_memory": 1 << 20}))
        return [Measured(PLAIN, tiny), *others]
    if name == phi and weights == BF16:
        mixed = [Load("mixed", count, PROMPT, OUTPUT) for count in MIXED]
        settings = [
            Measured(f"moray with {feature}", _decode(256, 512), options) for feature, options in features.items()
        ]
        eager = *_decode(*FEW), mixed[0]
        return [
            Measured(PLAIN, (*_decode(*DECODE), *mixed)),
            Measured(OWN_LIMITS, ()),
            *settings,
            Measured(EAGER, eager, {"cuda_graphs": False}),
        ]
    if name == phi:
        return [Measured(PLAIN, _decode(*QUANTIZED_DECODE))]
    if (name, weights) in ((phixtral, BF16), (mixtral, BF16)):
        return [Measured(PLAIN, _decode(32))]
    return [Measured(PLAIN, (Load("mixed", 256, PROMPT, OUTPUT), *_decode(256, *FEW)))]


def loads_of(measured: Measured, max_num_seqs: int, *, is_dry: bool = False) -> list[Load]:
    """Return the loads of an engine; where it has chosen its limits, of as many sequences, of half, and last FEWEST."""
    if measured.loads:
        return list(measured.loads)
    if is_dry:
        return [Load("decode", 3, 20, 3, 150)]
    counts = {max_num_seqs, max(max_num_seqs // 2, FEWEST), FEWEST}
    loads = [Load("decode", count, SHORT_PROMPT, STEPS) for count in sorted(counts, reverse=True)]
    return [load for load in loads if load.num_sequences <= max_num_seqs]


def _decode(*counts: int) -> tuple[Load, ...]:
    return tuple(Load("decode", count, PROMPT, STEPS) for count in counts)
