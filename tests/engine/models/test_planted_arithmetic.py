"""Tests that each known way to compute a family wrongly moves the logits: the tests of parity notice it.

Most of them hardly ever change the likeliest token, so logits are compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import Model, tokens
from safetensors.torch import load_file, save_file
from tiny_checkpoints import GPT_OSS, GRANITEMOE, OLMOE, QWEN2_MOE, QWEN3_MOE, Reference, write
from torch import Tensor, nn

from moray.engine.backends.cpu import backend as cpu_backend
from moray.engine.backends.cpu.backend import CpuBackend
from moray.engine.layers.attention import attention_layers
from moray.engine.layers.moe import SharedExpert, SparseMoe
from moray.kernels.cpu.norms import rms_norm_ref
from moray.kernels.cpu.qk_norm import qk_norm

TOLERANCE = 1e-4  # of the tests of parity
TEXT = tokens(90)

Plant = Callable[[nn.Module, pytest.MonkeyPatch], None]


def no_qk_norm(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.qk_norm = None


def norm_after_rope(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is the same for both halves of a head only if the norm comes before the rotation."""
    norms = {layer.k_cache.data_ptr(): layer.qk_norm for layer in attention_layers(model)}
    no_qk_norm(model, monkeypatch)
    rope_kv = cpu_backend.rope_kv

    def rotate_first(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, *rest: Any) -> Tensor:
        q, norm, slots = rope_kv(qkv, cos, sin, k_cache, *rest), norms[k_cache.data_ptr()], rest[1]
        assert norm is not None
        where = slots // k_cache.shape[2], slice(None), slots % k_cache.shape[2]
        k_cache[where] = rms_norm_ref(k_cache[where], norm.k_weight, norm.eps)
        return rms_norm_ref(q, norm.q_weight, norm.eps)

    monkeypatch.setattr(cpu_backend, "rope_kv", rotate_first)


def each_head_for_itself(_: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(_: CpuBackend, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, _q: int, _k: int, eps: float) -> None:
        for head in range(4):
            part = slice(16 * head, 16 * (head + 1))
            q, k = qkv[:, part], qkv[:, 64:128][:, part]
            both = torch.cat((q, k), dim=1)
            qk_norm(both, q_weight[part], k_weight[part], 1, 1, eps)
            q.copy_(both[:, :16])
            k.copy_(both[:, 16:])

    monkeypatch.setattr(CpuBackend, "norm_queries_and_keys", norm)


def weights_by(method: Any) -> Plant:
    def plant(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        for module in model.modules():
            if isinstance(module, SparseMoe):
                module.router.rule = replace(module.router.rule, method=method)

    return plant


def no_gate_of_the_shared_expert(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedExpert, "rule", replace(SharedExpert.rule, method="softmax"))


def window(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.sliding_window = QWEN2_MOE["sliding_window"]


def scale_by_head_dim(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.scale = layer.head_dim**-0.5


def no_clip(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.clip_qkv = None


def attribute(name: str, value: float) -> Plant:
    def plant(model: nn.Module, _: pytest.MonkeyPatch) -> None:
        owners = [module for module in model.modules() if hasattr(module, name)]
        assert owners
        for module in owners:
            setattr(module, name, value)

    return plant


def residual_multiplier_of_one(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.multiplier = 1.0


def embedding_multiplier_of_one(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    model.embed_tokens.multiplier = 1.0  # type: ignore[union-attr]


def no_sinks(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.sinks = None


def scaled_sinks(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(model):
        layer.sinks *= layer.scale  # type: ignore[operator]


def window_off_by_one(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    attention_layers(model)[0].sliding_window = GPT_OSS["sliding_window"] + 1


def windows_swapped(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    first, second = attention_layers(model)
    first.sliding_window, second.sliding_window = second.sliding_window, first.sliding_window


def no_attention_factor(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    model.rotary.mscale.fill_(1.0)  # type: ignore[operator, union-attr]


def no_factors(model: nn.Module, _: pytest.MonkeyPatch) -> None:
    model.rotary.inv_freq[0] = model.rotary.inv_freq[1]  # type: ignore[index, union-attr]


@dataclass(frozen=True)
class Case:
    """A mistake, planted into a loaded model of a config."""

    config: dict[str, Any]
    plant: Plant


CASES = {
    "qwen3: no q/k norm": Case(QWEN3_MOE, no_qk_norm),
    "qwen3: norm after rope": Case(QWEN3_MOE, norm_after_rope),
    "qwen3: not renormalised": Case(QWEN3_MOE, weights_by("softmax_all")),
    "olmoe: no q/k norm": Case(OLMOE, no_qk_norm),
    "olmoe: each head for itself": Case(OLMOE, each_head_for_itself),
    "olmoe: renormalised": Case(OLMOE, weights_by("softmax")),
    "olmoe: clip forgotten": Case(OLMOE | {"clip_qkv": 0.7}, no_clip),
    "qwen2: no gate of the shared expert": Case(QWEN2_MOE, no_gate_of_the_shared_expert),
    "qwen2: renormalised": Case(QWEN2_MOE, weights_by("softmax")),
    "qwen2: the window that is switched off": Case(QWEN2_MOE, window),
    "granite: scale of head_dim": Case(GRANITEMOE, scale_by_head_dim),
    "granite: weights over all experts": Case(GRANITEMOE, weights_by("softmax_all")),
    "granite: no residual multiplier": Case(GRANITEMOE, residual_multiplier_of_one),
    "granite: no embedding multiplier": Case(GRANITEMOE, embedding_multiplier_of_one),
    "gpt-oss: no sinks": Case(GPT_OSS, no_sinks),
    "gpt-oss: sinks scaled as scores": Case(GPT_OSS, scaled_sinks),
    "gpt-oss: window off by one": Case(GPT_OSS, window_off_by_one),
    "gpt-oss: windows swapped": Case(GPT_OSS, windows_swapped),
    "gpt-oss: no attention factor": Case(GPT_OSS, no_attention_factor),
    "gpt-oss: rope not stretched": Case(GPT_OSS, no_factors),
    "gpt-oss: weights over all experts": Case(GPT_OSS, weights_by("softmax_all")),
    "granite: logits multiplied": Case(GRANITEMOE, attribute("logits_scaling", 1 / GRANITEMOE["logits_scaling"])),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_moves_the_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = Model(write(tmp_path, case.config))
    right = model.logits(TEXT)
    case.plant(model.runner.model, monkeypatch)
    assert (model.logits(TEXT) - right).abs().max() > 30 * TOLERANCE


def gate(gate: Tensor, up: Tensor, limit: float, alpha: float, plus: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + plus)


# What is computed wrongly in the compiled kernels of experts is planted into the reference.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "right": lambda x, limit: gate(x[..., ::2], x[..., 1::2], limit, 1.702, 1),
    "halves in place of turns": lambda x, limit: gate(*x.chunk(2, dim=-1), limit, 1.702, 1),
    "up without + 1": lambda x, limit: gate(x[..., ::2], x[..., 1::2], limit, 1.702, 0),
    "alpha 1": lambda x, limit: gate(x[..., ::2], x[..., 1::2], limit, 1.0, 1),
    "no limit": lambda x, limit: gate(x[..., ::2], x[..., 1::2], 1e9, 1.702, 1),
    "gate limited on both sides": lambda x, limit: gate(x[..., ::2].clamp(min=-limit), x[..., 1::2], limit, 1.702, 1),
}


def test_a_mistake_in_the_clamped_swiglu_moves_the_logits(tmp_path: Path) -> None:
    folder = write(tmp_path, GPT_OSS)
    ours, reference = Model(folder).logits(TEXT), Reference(folder)
    for name, activate in ACTIVATIONS.items():
        for layer in reference.model.model.layers:
            layer.mlp.experts._apply_gate = partial(activate, limit=GPT_OSS["swiglu_limit"])
        gap = (ours - reference.logits(TEXT)).abs().max()
        assert gap < TOLERANCE if name == "right" else gap > 30 * TOLERANCE, (name, gap)


@pytest.mark.parametrize(
    ("config", "ending", "change"),
    [
        (GRANITEMOE, "input_linear.weight", lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1)),
        (QWEN2_MOE, "q_proj.bias", torch.zeros_like),
        (QWEN2_MOE, "k_proj.bias", torch.zeros_like),
        (QWEN2_MOE, "v_proj.bias", torch.zeros_like),
        (QWEN3_MOE, "q_norm.weight", torch.ones_like),
        (QWEN3_MOE, "k_norm.weight", torch.ones_like),
        (QWEN3_MOE, "layers.1.mlp.down_proj.weight", torch.zeros_like),
        (GPT_OSS, "router.bias", torch.zeros_like),
        (GPT_OSS, "v_proj.bias", torch.zeros_like),
        (GPT_OSS, "o_proj.bias", torch.zeros_like),
        (GPT_OSS, "gate_up_proj_bias", lambda bias: torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)),
        (GPT_OSS, "down_proj_bias", torch.zeros_like),
        (GPT_OSS, "layers.1.self_attn.sinks", torch.zeros_like),
    ],
)
def test_each_tensor_and_its_order_matter(
    tmp_path: Path, config: dict[str, Any], ending: str, change: Callable[[Tensor], Tensor]
) -> None:
    folder = write(tmp_path, config)
    right = Model(folder).logits(TEXT)
    tensors = load_file(folder / "model.safetensors")
    changed = [name for name in tensors if name.endswith(ending)]
    assert changed
    save_file(tensors | {name: change(tensors[name]).contiguous() for name in changed}, folder / "model.safetensors")
    assert (Model(folder).logits(TEXT) - right).abs().max() > 30 * TOLERANCE
