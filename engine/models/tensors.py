"""Map published tensors to the fused parameters, for the parts that several architectures name alike."""

from moray.engine.checkpoint.weights import Target
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import qkv_rows

TensorMap = dict[str, Target]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def plain(name: str, ours: str, shape: tuple[int, ...], *parts: str) -> TensorMap:
    """Map `name.part` to `ours.part` for each part; a bias has the weight's first dimension."""
    return {f"{name}.{p}": Target(f"{ours}.{p}", shape if p == "weight" else shape[:1]) for p in parts}


def split_qkv(
    config: ModelConfig, name: str, ours: str, *parts: str, of_output: tuple[str, ...] | None = None
) -> TensorMap:
    """Map q_proj, k_proj and v_proj into the stacked qkv_proj, and o_proj to itself.

    parts:      "weight", and "bias" if there is one
    of_output:  the same of o_proj; None = as the others
    """
    width = config.num_heads * config.head_dim
    targets = plain(f"{name}.o_proj", f"{ours}.o_proj", (config.hidden_size, width), *(of_output or parts))
    for letter, rows in qkv_rows(config).items():
        shape = (rows.stop - rows.start, config.hidden_size)
        for part in parts:
            source = f"{name}.{letter}_proj.{part}"
            targets[source] = Target(f"{ours}.qkv_proj.{part}", shape if part == "weight" else shape[:1], (rows,))
    return targets


def swiglu_experts(
    config: ModelConfig, name: str, ours: str, parts: tuple[str, str, str] = ("w1", "w3", "w2")
) -> TensorMap:
    """Map the matrices of experts.E into those of GatedExperts.

    parts: the published names of gate, up and down
    """
    targets: TensorMap = {}
    for e in range(config.num_experts):
        targets |= swiglu(f"{name}.{e}", ours, config.hidden_size, config.intermediate_size, parts, e)
    return targets


def swiglu(name: str, ours: str, h: int, i: int, parts: tuple[str, str, str] = PROJECTIONS, e: int = 0) -> TensorMap:
    """Map gate and up of an MLP into the stacked gate_up_proj[e], gate first, and down to down_proj[e].

    h, i:   hidden_size and intermediate_size
    parts:  the published names of gate, up and down
    """
    gate, up, down = parts
    return {
        f"{name}.{gate}.weight": Target(f"{ours}.gate_up_proj", (i, h), (e, slice(0, i))),
        f"{name}.{up}.weight": Target(f"{ours}.gate_up_proj", (i, h), (e, slice(i, 2 * i))),
        f"{name}.{down}.weight": Target(f"{ours}.down_proj", (h, i), (e,)),
    }


def map_qk_norm(name: str, ours: str, q_size: int, k_size: int) -> TensorMap:
    """Map q_norm and k_norm to the weights of a QueryKeyNorm. q_size, k_size: columns that are normalised together"""
    return {
        f"{name}.q_norm.weight": Target(f"{ours}.qk_norm.q_weight", (q_size,)),
        f"{name}.k_norm.weight": Target(f"{ours}.qk_norm.k_weight", (k_size,)),
    }
