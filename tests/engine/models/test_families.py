"""Tests of the register of families: a family that a test adds runs through the engine like those that are there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import MIXTRAL
from torch import Tensor, nn

from moray.engine.backends.inputs import ModelInputs
from moray.engine.checkpoint.config_fields import read_experts, read_rope
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.families.family import Family
from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.engine import Engine
from moray.engine.errors import CheckpointError
from moray.engine.json_options import JsonOptions
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.embedding import Embedding
from moray.engine.layers.linear import GatheredLinear
from moray.engine.layers.moe import GatedExperts, Router, SparseMoe
from moray.engine.layers.norm import RMSNorm
from moray.engine.layers.rotary import RotaryEmbedding
from moray.engine.models import ARCHITECTURES
from moray.engine.models.base import CausalLM
from moray.engine.models.tensors import TensorMap, plain, split_qkv, swiglu_experts
from moray.engine.params import SamplingParams
from moray.engine.partition import WHOLE, Partition
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.request import Request


def _read(options: JsonOptions, shared: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        **shared,
        **read_experts(options),
        intermediate_size=options.whole("intermediate_size"),
        num_kv_heads=shared["num_heads"] // options.whole("queries_per_kv_head"),
        rope=read_rope(options, shared["head_dim"], longrope=False),
    )


class ToyLayer(nn.Module):
    """A layer with Mixtral's arithmetic."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attention = SelfAttention(config, partition, bias=False)
        self.moe = SparseMoe(Router(config, "softmax"), GatedExperts(config, partition))


class ToyForCausalLM(CausalLM):
    """A model with Mixtral's arithmetic and names of its own."""

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition)
        self.rotary = RotaryEmbedding(config.rope)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config, partition) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = GatheredLinear(config.hidden_size, config.vocab_size, partition, bias=False)

    def forward(self, inputs: ModelInputs) -> Tensor:
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x, residual = self.embedding(inputs.input_ids), None
        for layer in self.layers:
            x, residual = layer.norms[0].add(x, residual)
            x, residual = layer.norms[1].add(layer.attention(x, rotary, inputs), residual)
            x = layer.moe(x, inputs.num_tokens)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.head(hidden_states)

    def validate_weights(self) -> None:
        assert self.head.weight is not None
        if not self.head.weight.isfinite().all():
            raise CheckpointError("toy.head is not finite.")

    @staticmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        h, v = config.hidden_size, config.vocab_size
        targets = plain("toy.words", "embedding", (v, h), "weight")
        targets |= plain("toy.norm", "norm", (h,), "weight")
        targets |= plain("toy.head", "head", (v, h), "weight")
        for n in range(config.num_layers):
            name, ours = f"toy.{n}", f"layers.{n}"
            targets |= plain(f"{name}.first", f"{ours}.norms.0", (h,), "weight")
            targets |= plain(f"{name}.second", f"{ours}.norms.1", (h,), "weight")
            targets |= split_qkv(config, f"{name}.attention", f"{ours}.attention", "weight")
            targets |= plain(f"{name}.router", f"{ours}.moe.router", (config.num_experts, h), "weight")
            targets |= swiglu_experts(config, f"{name}.expert", f"{ours}.moe.experts")
        return targets


# Mixtral's names -> the toy's
NAMES = (
    (r"model\.layers\.", "toy."),
    (r"model\.embed_tokens", "toy.words"),
    (r"model\.norm", "toy.norm"),
    (r"lm_head", "toy.head"),
    (r"input_layernorm", "first"),
    (r"post_attention_layernorm", "second"),
    (r"self_attn", "attention"),
    (r"block_sparse_moe\.gate", "router"),
    (r"block_sparse_moe\.experts", "expert"),
)


def renamed(name: str) -> str:
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


@pytest.fixture
def toy(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the toy family, and return a checkpoint of it with the weights of Mixtral's."""
    monkeypatch.setitem(
        FAMILIES, "toy", Family(_read, MatrixNames("toy.words", r".*\.router", "toy.head"), {"hidden_size": "width"})
    )
    monkeypatch.setitem(ARCHITECTURES, "toy", ToyForCausalLM)
    config = {key: value for key, value in MIXTRAL.items() if key not in ("hidden_size", "num_key_value_heads")}
    config |= {"model_type": "toy", "width": MIXTRAL["hidden_size"], "queries_per_kv_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoints["mixtral"] / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


def generate(folder: Path) -> dict[str, object]:
    engine = Engine(str(folder), EngineConfig(device="cpu", max_num_batched_tokens=16, kv_cache_memory=200_000))
    for i, length in enumerate((1, 9, 30)):
        params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2, temperature=float(i % 2))
        engine.add(Request(str(i), list(range(5, 5 + length)), params, stream_key=i))
    done: dict[str, object] = {}
    while engine.has_work:
        done |= {output.request_id: output.completion for output in engine.step() if output.completion}
    assert engine.expert_tokens().sum() == 2 * 2 * engine.metrics.computed_tokens
    return done


def test_a_family_is_in_both_registers() -> None:
    assert list(ARCHITECTURES) == list(FAMILIES)


def test_a_family_that_is_added_runs_through_the_engine(checkpoints: dict[str, Path], toy: Path) -> None:
    assert generate(toy) == generate(checkpoints["mixtral"]), "the same weights and arithmetic give the same bits"


def test_a_family_may_refuse_the_weights(toy: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    tensors["toy.head.weight"][3, 3] = torch.nan
    save_file(tensors, toy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"toy\.head is not finite"):
        generate(toy)
