"""Checkpoints in published quantized formats, packed here with plain integer arithmetic, and what their weights are.

test_unpack.py compares the packing with what the real programs stored.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny_checkpoints import GPT_OSS, write
from torch import Tensor

FOLDER = ROOT / "tests/engine/quantization/published"
# case -> quantization_config, as the programs wrote it
CONFIGS: dict[str, dict[str, Any]] = json.loads((FOLDER / "configs.json").read_text())
GROUP = 16  # in configs.json
PUBLISHED_GROUP = 32  # in whole models: the kernels need more


@dataclass(frozen=True)
class Coded:
    """A weight as the formats have it.

    codes:   [out_features, in_features], not negative, or the values of fp8
    zeros:   [rows, groups], the codes of 0
    scales:  [rows, groups], where rows is 1 or out_features, or fewer in blocks
    weight:  what they stand for, in fp32
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    weight: Tensor


def encode(case: str, weight: Tensor, group: int = GROUP) -> Coded:
    """Quantize a weight in the way of a case, to scales that the format can hold."""
    out_features, in_features = weight.shape
    rows, columns = 1, in_features
    if "group" in case or not case.startswith("compressed-tensors"):
        columns = group
    elif "tensor" in case.removeprefix("compressed-tensors"):
        rows = out_features
    elif "block" in case:
        rows, columns = 16, group // 2
    padded = torch.zeros(-(-out_features // rows) * rows, -(-in_features // columns) * columns)
    padded[:out_features, :in_features] = weight
    cells = padded.view(padded.shape[0] // rows, rows, -1, columns)
    dtype = torch.bfloat16 if case.startswith("compressed-tensors") else torch.float16
    largest = cells.abs().amax((1, 3))
    if "fp8" in case:
        scales = (largest / 448).to(dtype).float()
        zeros = torch.zeros_like(scales)
        codes = (cells / scales[:, None, :, None]).to(torch.float8_e4m3fn).float()
    else:
        top = 255 if "int8" in case else 15
        if "asym" in case or case in ("awq", "gptq-v2"):
            low, high = cells.amin((1, 3)).clamp(max=0), cells.amax((1, 3)).clamp(min=0)
            scales = ((high - low) / top).to(dtype).float()
            zeros = (-low / scales).round().clamp(1, top)
        else:
            scales = (2 * largest / top).to(dtype).float()
            zeros = torch.full_like(scales, (top + 1) // 2)
        codes = (cells / scales[:, None, :, None] + zeros[:, None, :, None]).round().clamp(0, top)
    values = (codes - zeros[:, None, :, None]) * scales[:, None, :, None]
    return Coded(
        codes.view_as(padded)[:out_features, :in_features],
        zeros,
        scales,
        values.view_as(padded)[:out_features, :in_features].contiguous(),
    )


def store(case: str, coded: Coded) -> dict[str, Tensor]:
    """Return the tensors of a coded weight by suffix, as the format of a case stores them."""
    codes, zeros, scales = coded.codes, coded.zeros, coded.scales
    bits = 8 if "int8" in case else 4
    half = 1 << (bits - 1)
    if case == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        mixed = [value.T.reshape(value.shape[1], -1, 8)[..., order].flatten(1) for value in (codes, zeros)]
        return {"qweight": words(mixed[0], 4), "qzeros": words(mixed[1], 4), "scales": scales.T.half()}
    if case.startswith("gptq"):
        stored_zeros = zeros if case == "gptq-v2" else zeros - 1
        g_idx = torch.arange(codes.shape[1], dtype=torch.int32) // -(-codes.shape[1] // scales.shape[1])
        return {
            "qweight": words(codes, bits).T, "qzeros": words(stored_zeros.T, bits), "scales": scales.T.half(),
            "g_idx": g_idx,
        }  # fmt: skip
    scale = {"weight_scale": (scales.view(1) if "fp8-tensor" in case else scales).bfloat16()}
    if "fp8" in case:
        return scale | {"weight": codes.to(torch.float8_e4m3fn)}
    if "words" in case:
        shape = {"weight_shape": torch.tensor(codes.shape)}
        packed_zeros = {"weight_zero_point": words(zeros.T, bits).T} if "asym" in case else {}
        return scale | shape | packed_zeros | {"weight_packed": words(codes, bits)}
    plain_zeros = {"weight_zero_point": (zeros - half).to(torch.int8)} if "asym" in case else {}
    return scale | plain_zeros | {"weight": (codes - half).to(torch.int8)}


def words(values: Tensor, bits: int) -> Tensor:
    """Pack rows of numbers into 32-bit words, low bits first."""
    each = 32 // bits
    packed = [
        [sum(int(value) << (bits * i) for i, value in enumerate(row[first : first + each]))
         for first in range(0, len(row), each)]
        for row in values.tolist()
    ]  # fmt: skip
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in row] for row in packed]).int()


def is_coded(name: str, tensor: Tensor) -> bool:
    """Return whether a published tensor is a weight of attention or an expert."""
    other = (".gate.", "shared_expert_gate", "embed", ".embd.", "lm_head")
    return name.endswith(".weight") and tensor.dim() == 2 and not any(part in name for part in other)


def publish(
    plain: Path, out: Path, case: str, choose: Callable[[str, Tensor], bool] = is_coded, **changes: Any
) -> tuple[Path, Path]:
    """Write a plain checkpoint in the format of a case, and the weights that it stands for as a plain checkpoint.

    choose:   which tensors are quantized
    changes:  fields of quantization_config that differ from the case's

    Returns the two folders.
    """
    config = json.loads((plain / "config.json").read_text())
    stored, exact = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not choose(name, tensor):
            stored[name] = exact[name] = tensor
            continue
        coded = encode(case, tensor.float(), PUBLISHED_GROUP)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in store(case, coded).items()}
        exact[name] = coded.weight
    heads = ["lm_head", "lm_head.linear", r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"]
    quantization: dict[str, Any] = copy.deepcopy(CONFIGS[case])
    if case.startswith("compressed-tensors"):
        quantization["ignore"] = heads
        weights = quantization["config_groups"]["group_0"]["weights"]
        if weights["group_size"] is not None:
            weights["group_size"] = PUBLISHED_GROUP
        if "block_structure" in weights:
            weights["block_structure"] = [16, PUBLISHED_GROUP // 2]
    else:
        quantization["group_size"] = PUBLISHED_GROUP
    quantization |= changes
    for folder, tensors, extra in (
        (out / "published", stored, {"quantization_config": quantization}),
        (out / "exact", exact, {}),
    ):
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | extra))
    return out / "published", out / "exact"


MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def made_mxfp4(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random codes of MXFP4, [.., groups, 16] bytes, and the exponents of their scales, [.., groups]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)


def publish_mxfp4(out: Path) -> tuple[Path, Path]:
    """Write a gpt-oss with random MXFP4 experts, and the same in bfloat16 as transformers dequantizes them.

    Returns the two folders.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GPT_OSS | {"intermediate_size": 64, "torch_dtype": "bfloat16"}
    exact, published = write(out / "exact", config, dtype=torch.bfloat16), out / "published"
    plain, coded = load_file(exact / "model.safetensors"), dict[str, Tensor]()
    for seed, name in enumerate(sorted(plain)):
        coded[name] = plain[name]
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inputs, outputs = plain[name].shape
            blocks, exponents = made_mxfp4(num_experts, outputs, inputs // 32, seed=seed)
            coded |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
            plain[name] = convert_moe_packed_tensors(blocks, exponents).contiguous()
            del coded[name]
    save_file(plain, exact / "model.safetensors")
    published.mkdir()
    save_file(coded, published / "model.safetensors")
    (published / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    return published, exact
