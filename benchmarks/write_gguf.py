"""Write a checkpoint of the benchmarks as a GGUF file for llama.cpp.

Matrices stay bf16; norms, biases, sinks and routers are f32, as llama.cpp's own converter has them. The names of its
tensors and the words for its numbers are those of the package gguf, which must be installed.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Named = tuple[str, Tensor]
EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(.*)")


def write_gguf(folder: Path) -> Path:
    """Write the weights for llama.cpp next to the checkpoint, if they are not there yet; return the path.

    Raises ImportError where the gguf package is missing, KeyError for a family that FAMILIES lacks.
    """
    import gguf

    path = folder / "model-bf16.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    # It gets its name when it is complete: the next run would use what a stopped one left.
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), family.name)
    _add_numbers(writer, config)
    family.add_numbers(writer, config)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = family.arrange(_merge_experts(load_file(folder / "model.safetensors")), config)
    for name, tensor in (*tensors, *family.factors(config)):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        theirs = theirs if theirs.endswith((".weight", ".bias")) else f"{theirs}.weight"
        if tensor.dim() == 1 or "gate_inp" in theirs or theirs.endswith(".bias"):
            writer.add_tensor(theirs, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)
    return path


def _add_numbers(writer: Any, config: dict[str, Any]) -> None:
    """Add what all families have: sizes, heads, experts and rope."""
    import gguf

    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_expert_count(config.get("num_local_experts", config.get("num_experts")))
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _merge_experts(tensors: dict[str, Tensor]) -> Iterator[Named]:
    """Yield the tensors, with those of a layer's experts in one: [experts, ...]."""
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            start, number, end = match.groups()
            experts[start + end][int(number)] = tensor
        else:
            yield name, tensor
    for name, of_layer in experts.items():
        yield name, torch.stack([of_layer[number] for number in range(len(of_layer))])


def _as_they_are(tensors: Iterator[Named], _: dict[str, Any]) -> Iterator[Named]:
    return tensors


def _nothing(*_: Any) -> tuple[Named, ...]:
    return ()


@dataclass(frozen=True)
class Family:
    """Describes how llama.cpp reads a family.

    name:         its word for the family
    add_numbers:  adds to a writer what only this family has in config.json
    arrange:      returns the tensors as llama.cpp wants them, under names that transformers knows or the final ones
    factors:      returns tensors that are lists in config.json
    """

    name: str
    add_numbers: Callable[[Any, dict[str, Any]], Any] = _nothing
    arrange: Callable[[Iterator[Named], dict[str, Any]], Iterator[Named]] = _as_they_are
    factors: Callable[[dict[str, Any]], tuple[Named, ...]] = _nothing


def _add_phi_numbers(writer: Any, config: dict[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_rope_scaling_attn_factors(config["rope_scaling"]["short_mscale"])
    writer.add_sliding_window(0)


def _phi_factors(config: dict[str, Any]) -> tuple[Named, ...]:
    rope = config["rope_scaling"]
    return tuple((f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"])) for kind in ("long", "short"))


def _add_shared_expert(writer: Any, config: dict[str, Any]) -> None:
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _arrange_qwen2(tensors: Iterator[Named], _: dict[str, Any]) -> Iterator[Named]:
    for name, tensor in tensors:
        yield name, tensor.reshape(-1) if name.endswith("shared_expert_gate.weight") else tensor


def _add_granite_numbers(writer: Any, config: dict[str, Any]) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _arrange_granite(tensors: Iterator[Named], config: dict[str, Any]) -> Iterator[Named]:
    """Split gates and ups, and order q and k so that the two numbers which rope rotates are neighbours."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors:
        part = name.split(".")[-2]
        if part == "input_linear":
            layer = name.split(".")[2]
            for kind, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                yield f"blk.{layer}.ffn_{kind}_exps.weight", half
        elif part in heads:
            halves = tensor.reshape(heads[part], 2, -1, tensor.shape[1])
            yield name, halves.transpose(1, 2).reshape(tensor.shape)
        else:
            yield name, tensor


def _add_gpt_oss_numbers(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    rope = config["rope_parameters"]
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _arrange_gpt_oss(tensors: Iterator[Named], _: dict[str, Any]) -> Iterator[Named]:
    """Split gates and ups, which alternate, and transpose the experts' matrices."""
    for name, tensor in tensors:
        stem = name.removesuffix("_bias")
        end = "weight" if stem == name else "bias"
        turned = tensor.transpose(1, 2) if tensor.dim() == 3 else tensor  # [experts, out, in], or biases [experts, out]
        if stem.endswith("gate_up_proj"):
            layer = name.split(".")[2]
            for first, kind in enumerate(("gate", "up")):
                yield f"blk.{layer}.ffn_{kind}_exps.{end}", turned[:, first::2]
        elif stem.endswith("experts.down_proj"):
            yield f"{stem}.{end}", turned
        else:
            yield name, tensor


# transformers' word for a family -> how llama.cpp reads it
FAMILIES = {
    "phimoe": Family("phimoe", _add_phi_numbers, factors=_phi_factors),
    "qwen3_moe": Family("qwen3moe"),
    "olmoe": Family("olmoe"),
    "qwen2_moe": Family("qwen2moe", _add_shared_expert, _arrange_qwen2),
    "granitemoe": Family("granitemoe", _add_granite_numbers, _arrange_granite),
    "gpt_oss": Family("gpt-oss", _add_gpt_oss_numbers, _arrange_gpt_oss),
}
