"""Map published tensors to the fused parameters, for the parts that several architectures name alike."""

from moray.engine.checkpoint.weights import Target
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import qkv_rows

TensorMap = dict[str, Target]


def plain(name: str, ours: str, shape: tuple[int, ...], *parts: str) -> TensorMap:
    """Map `name.part` to `ours.part` for each part; a bias has the weight's first dimension."""
    return {f"{name}.{p}": Target(f"{ours}.{p}", shape if p == "weight" else shape[:1]) for p in parts}


def split_qkv(config: ModelConfig, name: str, ours: str, *parts: str) -> TensorMap:
    """Map q_proj, k_proj and v_proj into the stacked qkv_proj, and o_proj to itself."""
    width = config.num_heads * config.head_dim
    targets = plain(f"{name}.o_proj", f"{ours}.o_proj", (config.hidden_size, width), *parts)
    for letter, rows in qkv_rows(config).items():
        shape = (rows.stop - rows.start, config.hidden_size)
        for part in parts:
            source = f"{name}.{letter}_proj.{part}"
            targets[source] = Target(f"{ours}.qkv_proj.{part}", shape if part == "weight" else shape[:1], (rows,))
    return targets


def swiglu_experts(config: ModelConfig, name: str, ours: str) -> TensorMap:
    """Map experts.E.{w1, w3} into the stacked gate_up_proj[E], gate (w1) first, and w2 to down_proj[E]."""
    h, i = config.hidden_size, config.intermediate_size
    targets: TensorMap = {}
    for e in range(config.num_experts):
        targets[f"{name}.{e}.w1.weight"] = Target(f"{ours}.gate_up_proj", (i, h), (e, slice(0, i)))
        targets[f"{name}.{e}.w3.weight"] = Target(f"{ours}.gate_up_proj", (i, h), (e, slice(i, 2 * i)))
        targets[f"{name}.{e}.w2.weight"] = Target(f"{ours}.down_proj", (h, i), (e,))
    return targets
