"""Write the model of the benchmarks, a random bf16 Phi-MoE of 716 M parameters, as published.

The benchmarks call this module; `python benchmarks/bench_model.py` writes the file and prints its path.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VERSION = 2  # part of the folder's name: raise it when the weights or the config change
CACHE = Path.home() / ".cache" / "moray" / "bench"

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 1024, 1600, 8, 16, 4, 64
EXPERTS, VOCAB = 16, 32064
MAX_POSITIONS, ORIGINAL_POSITIONS = 131072, 4096
MSCALE = 1.243163121016122  # as published for Phi-3.5-MoE, not what the LongRoPE formula gives

# Ending of a tensor's name -> standard deviation. That of the gate spreads tokens over all experts; that of the
# embedding makes a token's own part of the residual stream as large as what the layers add, so that tokens differ in
# their experts.
STD = {"gate.weight": 0.05, "embed_tokens.weight": 0.5, "w2.weight": 0.005, "bias": 0.02, "weight": 0.02}
# Every token has a likely successor, as in text: the successor's row of lm_head has this multiple of the token's
# embedding added. Without it (and with larger w2) the best logits nearly tie, and bf16 rounding gives each contender
# other tokens.
SUCCESSOR_WEIGHT = 0.0125


def config() -> dict[str, Any]:
    """Return config.json in the hub's spelling, with lists of rope factors that grow as the published ones do."""
    pairs = HEAD_DIM // 2
    return {
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": "phimoe",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "input_jitter_noise": 0.01,
        "intermediate_size": INTERMEDIATE,
        "lm_head_bias": True,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": EXPERTS,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / pairs for i in range(pairs)],
            "long_factor": [64.0 ** (i / (pairs - 1)) for i in range(pairs)],
            "short_mscale": MSCALE,
            "long_mscale": MSCALE,
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def tensor_shapes(values: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of the model with this config, as published."""
    hidden, intermediate, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    q, kv = values["num_attention_heads"] * HEAD_DIM, values["num_key_value_heads"] * HEAD_DIM
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(values["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{norm}.weight", (hidden,)
            yield f"{layer}{norm}.bias", (hidden,)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, columns)
            yield f"{layer}self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}block_sparse_moe.gate.weight", (values["num_local_experts"], hidden)
        for e in range(values["num_local_experts"]):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            yield f"{expert}w1.weight", (intermediate, hidden)
            yield f"{expert}w2.weight", (hidden, intermediate)
            yield f"{expert}w3.weight", (intermediate, hidden)
    yield "model.norm.weight", (hidden,)
    yield "model.norm.bias", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    yield "lm_head.bias", (vocab,)


def num_parameters() -> int:
    return sum(math.prod(shape) for _, shape in tensor_shapes(config()))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    std = next(value for ending, value in STD.items() if name.endswith(ending))
    tensor = torch.randn(shape, generator=generator).mul_(std)
    if "norm" in name and name.endswith("weight"):
        tensor += 1
    return tensor.bfloat16()


def write_checkpoint(folder: Path | None = None, **changes: Any) -> Path:
    """Write the checkpoint, if it is not there yet, and return its folder.

    folder:   None = a folder in the cache
    changes:  values of config.json that are different, for a smaller model in a folder of its own
    """
    assert folder or not changes, "the folder in the cache is that of the model of 716 M parameters"
    folder = folder or CACHE / f"phimoe-716m-v{VERSION}"
    values = config() | changes
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        tensors = {name: _random(name, shape, generator) for name, shape in tensor_shapes(values)}
        tensors["lm_head.weight"] += SUCCESSOR_WEIGHT * tensors["model.embed_tokens.weight"].roll(1, dims=0)
        (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        # It gets its name when it is complete: the next run would use what a stopped one left.
        partial = weights.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.rename(weights)
    return folder


def add_tokenizer(checkpoint: Path) -> Path:
    """Return a folder of the same weights with a tokenizer, which a batch job needs.

    The tokenizer has the bytes and made-up words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = checkpoint.with_name(checkpoint.name + "-tokenizer")
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                (folder / name).symlink_to(checkpoint / name)
        bytes_alone = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [f"Ġword{i}" for i in range(VOCAB - len(bytes_alone))]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(bytes_alone + words)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


if __name__ == "__main__":
    print(f"{num_parameters() / 1e6:.1f} M parameters: {write_checkpoint() / 'model.safetensors'}")
