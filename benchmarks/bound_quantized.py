"""Compute the bounds of decoding with quantized weights from shapes, and print them as a Markdown table.

    python benchmarks/bound_quantized.py

A GPU's rates are those of its data sheet times the share of an H200's that was measured (gpu/roofline.py).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu.roofline import DENSE, H200, Ceilings, Step, Weights, seconds, step, weight_bytes

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import ModelConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
MODELS = ("phi-3.5-moe", "mixtral-8x7b")
SEQUENCES = (1, 32, 256)
CONTEXT = 640  # mean number of keys of a sequence
SCALE_BITS = 32
FORMATS = (
    DENSE,
    Weights("int8 or fp8", 8 + SCALE_BITS / 4096),
    Weights("int4, groups of 128", 4 + SCALE_BITS / 128),
    Weights("fp8 x fp8", 8 + SCALE_BITS / 4096, speed=2),
)
USABLE = 0.92  # of the memory, for weights and cache
MIN_CACHE = 2e9  # bytes of KV cache that an engine needs at least


@dataclass(frozen=True)
class GpuSheet:
    """Holds figures of a GPU's data sheet.

    memory:   bytes
    has_fp8:  it multiplies fp8
    """

    name: str
    bytes_per_s: float
    bf16_flops_per_s: float
    memory: float
    has_fp8: bool

    @property
    def ceilings(self) -> Ceilings:
        """Return the rates of the data sheet times the share of them that was measured on an H200."""
        sheet = GPUS[-1]
        bytes_share = H200.bytes_per_s / sheet.bytes_per_s
        flops_share = H200.flops_per_s / sheet.bf16_flops_per_s
        return Ceilings(self.bytes_per_s * bytes_share, self.bf16_flops_per_s * flops_share)


GPUS = (
    GpuSheet("A100-80GB", 2.039e12, 312e12, 85e9, has_fp8=False),
    GpuSheet("H100", 3.35e12, 989e12, 85e9, has_fp8=True),
    GpuSheet("H200", 4.8e12, 989e12, 150e9, has_fp8=True),
)


def tokens_per_s(gpu: GpuSheet, config: ModelConfig, sequences: int, weights: Weights) -> float:
    """Return the bound on the tokens that this number of sequences decodes in a second."""
    return sequences / seconds(gpu.ceilings, step(config, Step(sequences, CONTEXT), weights))


def table() -> list[str]:
    """Return the lines of the Markdown table."""
    lines = ["| Model | GPU | Weights | GB | " + " | ".join(f"{n} sequences" for n in SEQUENCES) + " |"]
    lines.append("|---" * (4 + len(SEQUENCES)) + "|")
    for model in MODELS:
        config = read_model_config(CONFIGS / model)
        for gpu in GPUS:
            for weights in FORMATS:
                if weights.speed > 1 and not gpu.has_fp8:
                    continue
                size = weight_bytes(config, weights)
                fits = size + MIN_CACHE < USABLE * gpu.memory
                cells = []
                for sequences in SEQUENCES:
                    found = tokens_per_s(gpu, config, sequences, weights)
                    ratio = found / tokens_per_s(gpu, config, sequences, DENSE)
                    cells.append(f"{found:,.0f} ({ratio:.2f})" if weights is not DENSE else f"{found:,.0f}")
                room = f"{size / 1e9:.1f}" + ("" if fits else ", too large")
                lines.append(f"| {model} | {gpu.name} | {weights.name} | {room} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    print("\n".join(table()))


if __name__ == "__main__":
    main()
