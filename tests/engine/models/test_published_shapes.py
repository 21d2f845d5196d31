"""Tests that the published configs give the tensors that the published index files list: names, shapes and numbers."""

import math
from collections.abc import Callable

import pytest
from repository import CONFIGS

from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.weight_files import StoredTensor
from moray.engine.models import ARCHITECTURES

Shapes = dict[str, tuple[int, ...]]


def outside(vocab_size: int, hidden_size: int, num_layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocab_size, hidden_size), "model.norm.weight": (hidden_size,)}
    for n in range(num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{norm}.weight"] = (hidden_size,)
    return shapes


def projections(name: str, **shapes: tuple[int, int]) -> Shapes:
    return {f"{name}.{letter}_proj.weight": shape for letter, shape in shapes.items()}


def qwen3_30b_a3b() -> Shapes:
    shapes = outside(151936, 2048, 48) | {"lm_head.weight": (151936, 2048)}
    for n in range(48):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        shapes |= projections(attention, q=(4096, 2048), k=(512, 2048), v=(512, 2048), o=(2048, 4096))
        shapes |= {f"{attention}.q_norm.weight": (128,), f"{attention}.k_norm.weight": (128,)}
        shapes[f"{mlp}.gate.weight"] = (128, 2048)
        for e in range(128):
            shapes |= projections(f"{mlp}.experts.{e}", gate=(768, 2048), up=(768, 2048), down=(2048, 768))
    assert len(shapes) == 18867
    return shapes


def olmoe_1b_7b() -> Shapes:
    shapes = outside(50304, 2048, 16) | {"lm_head.weight": (50304, 2048)}
    for n in range(16):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        shapes |= projections(attention, **dict.fromkeys("qkvo", (2048, 2048)))
        shapes |= {f"{attention}.q_norm.weight": (2048,), f"{attention}.k_norm.weight": (2048,)}
        shapes[f"{mlp}.gate.weight"] = (64, 2048)
        for e in range(64):
            shapes |= projections(f"{mlp}.experts.{e}", gate=(1024, 2048), up=(1024, 2048), down=(2048, 1024))
    return shapes


def qwen15_moe() -> Shapes:
    shapes = outside(151936, 2048, 24) | {"lm_head.weight": (151936, 2048)}
    for n in range(24):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        shapes |= projections(attention, **dict.fromkeys("qkvo", (2048, 2048)))
        shapes |= {f"{attention}.{letter}_proj.bias": (2048,) for letter in "qkv"}
        shapes |= {f"{mlp}.gate.weight": (60, 2048), f"{mlp}.shared_expert_gate.weight": (1, 2048)}
        shapes |= projections(f"{mlp}.shared_expert", gate=(5632, 2048), up=(5632, 2048), down=(2048, 5632))
        for e in range(60):
            shapes |= projections(f"{mlp}.experts.{e}", gate=(1408, 2048), up=(1408, 2048), down=(2048, 1408))
    return shapes


def granite(layers: int, hidden: int, num_experts: int) -> Shapes:
    shapes = outside(49155, hidden, layers)
    for n in range(layers):
        attention, moe = f"model.layers.{n}.self_attn", f"model.layers.{n}.block_sparse_moe"
        shapes |= projections(attention, q=(hidden, hidden), k=(512, hidden), v=(512, hidden), o=(hidden, hidden))
        shapes[f"{moe}.input_linear.weight"] = (num_experts, 1024, hidden)
        shapes[f"{moe}.output_linear.weight"] = (num_experts, hidden, 512)
        shapes[f"{moe}.router.layer.weight"] = (num_experts, hidden)
    return shapes


def slim_phimoe(q: int, kv: int, inner: int) -> Shapes:
    shapes = outside(32064, 4096, 32)
    shapes |= {name.replace("weight", "bias"): shape for name, shape in shapes.items() if "norm" in name}
    shapes |= {"lm_head.weight": (32064, 4096), "lm_head.bias": (32064,)}
    for n in range(32):
        attention, moe = f"model.layers.{n}.self_attn", f"model.layers.{n}.block_sparse_moe"
        shapes |= projections(attention, q=(q, 4096), k=(kv, 4096), v=(kv, 4096), o=(4096, q))
        rows = {"q": q, "k": kv, "v": kv, "o": 4096}
        shapes |= {f"{attention}.{letter}_proj.bias": (size,) for letter, size in rows.items()}
        shapes[f"{moe}.gate.weight"] = (16, 4096)
        for e in range(16):
            shapes |= {f"{moe}.experts.{e}.{part}.weight": (inner, 4096) for part in ("w1", "w3")}
            shapes[f"{moe}.experts.{e}.w2.weight"] = (4096, inner)
    return shapes


def gpt_oss_20b() -> Shapes:
    shapes = outside(201088, 2880, 24) | {"lm_head.weight": (201088, 2880)}
    for n in range(24):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        shapes |= projections(attention, q=(4096, 2880), k=(512, 2880), v=(512, 2880), o=(2880, 4096))
        rows = {"q": 4096, "k": 512, "v": 512, "o": 2880}
        shapes |= {f"{attention}.{letter}_proj.bias": (size,) for letter, size in rows.items()}
        shapes |= {f"{attention}.sinks": (64,), f"{mlp}.router.weight": (32, 2880), f"{mlp}.router.bias": (32,)}
        experts = f"{mlp}.experts"
        shapes |= {f"{experts}.gate_up_proj": (32, 2880, 5760), f"{experts}.gate_up_proj_bias": (32, 5760)}
        shapes |= {f"{experts}.down_proj": (32, 2880, 2880), f"{experts}.down_proj_bias": (32, 2880)}
    return shapes


@pytest.mark.parametrize(
    ("name", "published", "billions"),
    [
        ("qwen3-30b-a3b", qwen3_30b_a3b, 30.53),
        ("granite-3.1-1b-a400m", lambda: granite(24, 1024, 32), 1.33),
        ("granite-3.1-3b-a800m", lambda: granite(32, 1536, 40), 3.30),
        ("olmoe-1b-7b", olmoe_1b_7b, 6.92),
        ("qwen1.5-moe-a2.7b-chat", qwen15_moe, 14.32),
        ("gpt-oss-20b", gpt_oss_20b, 20.91),
        ("phi-mini-moe", lambda: slim_phimoe(4096, 1024, 960), 7.65),
        ("phi-tiny-moe", lambda: slim_phimoe(2048, 512, 448), 3.76),
    ],
)
def test_the_model_has_the_published_tensors(name: str, published: Callable[[], Shapes], billions: float) -> None:
    config, shapes = read_model_config(CONFIGS / name), published()
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 2) == billions
    stored = {key: StoredTensor(key, "", "BF16", shape, 0, 2 * math.prod(shape)) for key, shape in shapes.items()}
    split = split_stacks(stored, config.architecture)
    mapped = ARCHITECTURES[config.architecture].tensor_map(config)
    assert {key: target.shape for key, target in mapped.items()} == {key: one.shape for key, one in split.items()}


def test_a_stack_is_split_into_the_bytes_of_its_experts() -> None:
    stack = StoredTensor("model.layers.0.block_sparse_moe.output_linear.weight", "f", "BF16", (3, 4, 5), 100, 220)
    other = StoredTensor("model.norm.weight", "f", "BF16", (4,), 0, 8)
    split = split_stacks({stack.name: stack, other.name: other}, "granitemoe")
    module = "model.layers.0.block_sparse_moe.output_linear"
    assert [(one.name, one.shape, one.begin, one.end) for one in split.values()] == [
        *((f"{module}.{e}.weight", (4, 5), 100 + 40 * e, 140 + 40 * e) for e in range(3)),
        ("model.norm.weight", (4,), 0, 8),
    ]
    assert all(key == one.name for key, one in split.items())
    assert list(split_stacks({stack.name: stack}, "mixtral")) == [stack.name], "no other family has stacks"
