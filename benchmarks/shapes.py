"""The shapes that the engine is compared on: random bf16 models of 0.6 to 0.7 billion parameters, one for each family.

A model has its family's number of experts, experts of a token, and relation of heads, of an expert's width and of the
hidden size; what shrinks is the hidden size, the number of layers and, to that of the Phi model, the vocabulary.
granite is narrow enough to have the widths and the vocabulary of granite-3.1-1b-a400m, and half of its layers. The Phi
model has a file of its own, bench_model.py: other benchmarks use it too, also smaller ones of its kind.

`python benchmarks/shapes.py` prints the table.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_model
import torch
from safetensors import safe_open
from torch import Tensor

VERSION = 1  # part of the folders' names: raise it when weights or configs change
PHI = "phi"


@dataclass(frozen=True)
class Shape:
    """Describes a random model.

    of:          the published model whose proportions it has
    model_type:  transformers' word for the family
    values:      of transformers' config, where they differ from its defaults
    """

    of: str
    model_type: str
    values: dict[str, Any]


COMMON = {"hidden_size": 1024, "vocab_size": bench_model.VOCAB, "eos_token_id": 2, "dtype": "bfloat16"}
SHAPES = {
    "qwen3": Shape(
        "Qwen3-30B-A3B",
        "qwen3_moe",
        COMMON
        | {
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 384,
            "norm_topk_prob": True,
        },
    ),
    "granite": Shape(
        "granite-3.1-1b-a400m",
        "granitemoe",
        COMMON
        | {
            "vocab_size": 49155,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "intermediate_size": 512,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 1 / 64,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": Shape(
        "OLMoE-1B-7B",
        "olmoe",
        COMMON
        | {
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 512,
        },
    ),
    "qwen2": Shape(
        "Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        COMMON
        | {
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 704,
            "shared_expert_intermediate_size": 2816,
        },
    ),
    "gpt_oss": Shape(
        "gpt-oss-20b",
        "gpt_oss",
        COMMON
        | {
            "num_hidden_layers": 6,
            "num_attention_heads": 24,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 1024,
        },
    ),
}
NAMES = (PHI, *SHAPES)

# Ending of a parameter's name in transformers -> standard deviation; the Phi model's, with its reasons.
STD = {
    "gate.weight": 0.05,
    "router.weight": 0.05,
    "embed_tokens.weight": 0.5,
    "down_proj": 0.005,
    "sinks": 1.0,
    "": 0.02,
}


class UnknownFamily(Exception):
    """Means that moray or the installed transformers does not have a shape's family."""


def write(name: str, folder: Path | None = None, **changes: Any) -> Path:
    """Write the checkpoint of a shape, if it is not there yet, and return its folder.

    folder:   None = a folder in the cache
    changes:  values of the config that are different, for a smaller model in a folder of its own

    Raises UnknownFamily where moray or transformers does not run it.
    """
    if name == PHI:
        return bench_model.write_checkpoint(folder, **changes)
    assert folder or not changes, "the folder in the cache is that of the shape in the table"
    folder = folder or bench_model.CACHE / f"{name}-v{VERSION}"
    if not (folder / "config.json").exists():
        model = _make(SHAPES[name], changes)
        fill(model)
        # It gets its name when it is complete: the next run would use what a stopped one left.
        partial = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(partial, max_shard_size="1TB")
        partial.rename(folder)
    return folder


def num_parameters(folder: Path) -> int:
    """Return the number of parameters that a checkpoint of `write` stores."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  (not a mapping)


def fill(model: Any) -> None:
    """Give a model of transformers its random weights, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = next(std for ending, std in STD.items() if name.endswith(ending))
        values = torch.randn(parameter.shape, generator=generator).mul_(std)
        parameter.data = (values + 1 if "norm" in name else values).bfloat16()
    embedding: Tensor = model.get_input_embeddings().weight
    head: Tensor = model.get_output_embeddings().weight
    if head is not embedding:
        head.data += bench_model.SUCCESSOR_WEIGHT * embedding.data.roll(1, dims=0)


def _make(shape: Shape, changes: dict[str, Any]) -> Any:
    """Return transformers' model of a shape, on torch's present device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moray.engine.models import ARCHITECTURES

    if shape.model_type not in ARCHITECTURES:
        raise UnknownFamily(f"moray has no family {shape.model_type}, of which {shape.of} is one.")
    try:
        config = AutoConfig.for_model(shape.model_type, **shape.values | changes)
    except ValueError:
        raise UnknownFamily(f"transformers has no family {shape.model_type}, of which {shape.of} is one.") from None
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    return auto.from_config(config)


def main() -> None:
    for name, shape in SHAPES.items():
        try:
            with torch.device("meta"):
                size = f"{_make(shape, {}).num_parameters() / 1e6:.0f} M parameters"
        except UnknownFamily as error:
            size = str(error)
        print(f"{name:8} {shape.of:21} {size}")
    print(f"{PHI:8} {'Phi-3.5-MoE':21} {bench_model.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
