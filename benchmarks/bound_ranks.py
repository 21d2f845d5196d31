"""Estimate from shapes what ranks on the GPUs of a node gain and what their gathers cost; print a Markdown table.

    python benchmarks/bound_ranks.py [--one-shot]

A rank computes its share of the bound of each operation (gpu/roofline.py). A gather takes LATENCY_S and its bytes over
the link; where it has more than one row, a copy of what came, too. Nothing of this is measured: the speeds of links are
those of data sheets times LINK_SHARE, the latencies are assumed.

For comparison: experts that are whole on a rank, each rank having as many. Attention is split as above. Every rank has
all hidden states, so nothing is sent to the experts; a layer has three gathers, without the wide one between up and
down. A step takes as long as the rank with the most work, which depends on the router: here each token draws its
experts at random.

--one-shot: what gathers of at most ONE_SHOT_BYTES would save of a step if each rank wrote or read the parts of all
others at once, in memory that the GPUs share, in place of NCCL's gather. The latencies of both are assumed. What comes
is copied out of that memory also where it has one row.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bound_quantized import CONTEXT, GPUS, MIN_CACHE, USABLE, GpuSheet
from gpu.roofline import ITEM, Ceilings, Step, Work, grouped, seconds, step, weight_bytes

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.config import ModelConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
SIZES = (2, 4, 8)
LATENCY_S = {2: 10e-6, 4: 12e-6, 8: 15e-6}  # of one of NCCL's gathers of few bytes, by the number of ranks
ONE_SHOT_S = {2: 4e-6, 4: 5e-6, 8: 6e-6}  # the same of a gather through memory that GPUs share
ONE_SHOT_BYTES = 1 << 20  # of what all ranks have together
LINK_SHARE = 0.8  # of a link's speed that a large gather reaches
COPY_S = 2e-6  # of a small kernel in a CUDA graph
PROMPT = 512
STEPS = {
    "1 sequence": Step(1, CONTEXT),
    "32 sequences": Step(32, CONTEXT),
    "256 sequences": Step(256, CONTEXT),
    "2,048 prompt tokens": Step(0, 0, prefill_rows=2048, prompt_tokens=PROMPT),
}
DRAWS = 30  # of a step's experts


@dataclass(frozen=True)
class Node:
    """Describes a node. bytes_per_s: of a GPU's links to all others, in one direction, by the data sheet"""

    name: str
    gpu: GpuSheet
    bytes_per_s: float


A100, H100, _ = GPUS
NODES = (
    Node("A100, NVLink", A100, 300e9),
    Node("H100, NVLink", H100, 450e9),
    Node("H100, PCIe 5.0", H100, 64e9),
)


def models() -> dict[str, ModelConfig]:
    """Return the models: Phi-3.5-MoE and Mixtral-8x22B, which has the architecture of Mixtral-8x7B."""
    small = read_model_config(CONFIGS / "mixtral-8x7b")
    large = replace(
        small, hidden_size=6144, intermediate_size=16384, num_layers=56, num_heads=48, head_dim=128, vocab_size=32768
    )
    return {"Phi-3.5-MoE": read_model_config(CONFIGS / "phi-3.5-moe"), "Mixtral-8x22B": large}


def gather_seconds(node: Node, size: int, rows: float, width: int) -> float:
    """Return the time of a gather of [rows, width] numbers, of which each rank has an equal part of the columns."""
    num_bytes = ITEM * rows * width
    sent = LATENCY_S[size] + num_bytes * (size - 1) / size / (LINK_SHARE * node.bytes_per_s)
    return sent if rows <= 1 else sent + COPY_S + 2 * num_bytes / node.gpu.ceilings.bytes_per_s


def one_shot_seconds(node: Node, size: int, rows: float, width: int) -> float:
    """Return the same through memory that the GPUs share where that is small enough, else of NCCL's gather."""
    num_bytes = ITEM * rows * width
    if num_bytes > ONE_SHOT_BYTES:
        return gather_seconds(node, size, rows, width)
    sent = ONE_SHOT_S[size] + num_bytes * (size - 1) / size / (LINK_SHARE * node.bytes_per_s)
    return sent + COPY_S + 2 * num_bytes / node.gpu.ceilings.bytes_per_s


def gathers(config: ModelConfig, of: Step, *, whole_experts: bool) -> Iterator[tuple[float, int]]:
    """Yield the rows and the width of each gather of a step."""
    tokens, top_k = of.decode_rows + of.prefill_rows, config.num_experts_per_tok
    for _ in range(config.num_layers):
        yield tokens, config.num_heads * config.head_dim
        yield tokens, config.hidden_size
        if not whole_experts:
            yield tokens * top_k, config.intermediate_size
        yield tokens * top_k, config.hidden_size
    yield of.decode_rows + (of.prefill_rows / of.prompt_tokens if of.prompt_tokens else 0), config.vocab_size


def step_seconds(node: Node, config: ModelConfig, of: Step, size: int, *, whole_experts: bool) -> tuple[float, float]:
    """Return the time of a step, and that of its gathers."""
    ceilings = node.gpu.ceilings
    sent = sum(gather_seconds(node, size, *one) for one in gathers(config, of, whole_experts=whole_experts))
    shares = [Work(work.num_bytes / size, work.flops / size) for work in step(config, of)]
    computed = seconds(ceilings, shares)
    if whole_experts:
        computed += config.num_layers * (
            _busiest(ceilings, config, of, size) - _busiest(ceilings, config, of, 1) / size
        )
    return computed + sent, sent


def _busiest(ceilings: Ceilings, config: ModelConfig, of: Step, size: int) -> float:
    """Return the mean time of a layer's experts on the rank with the most work, if they are whole on a rank."""
    tokens = of.decode_rows + of.prefill_rows
    draws = draw_experts(config.num_experts, config.num_experts_per_tok, tokens, size)
    return sum(max(_experts(ceilings, config, *rank) for rank in ranks) for ranks in draws) / len(draws)


@cache
def draw_experts(num_experts: int, top_k: int, tokens: int, size: int) -> list[list[tuple[int, int]]]:
    """Draw experts for all tokens, DRAWS times; return for each rank how many experts it runs, and their rows."""
    rng, draws = random.Random(0), []
    for _ in range(DRAWS):
        rows = Counter(expert for _ in range(tokens) for expert in rng.sample(range(num_experts), top_k))
        of_ranks = [[n for expert, n in rows.items() if expert % size == rank] for rank in range(size)]
        draws.append([(len(counts), sum(counts)) for counts in of_ranks])
    return draws


def _experts(ceilings: Ceilings, config: ModelConfig, hit: float, rows: int) -> float:
    i, h = config.intermediate_size, config.hidden_size
    return seconds(ceilings, [grouped(hit, rows, 2 * i, h), grouped(hit, rows, h, i)])


def fits(node: Node, config: ModelConfig, size: int) -> bool:
    """Return whether the weights and some KV cache fit into the GPUs of the ranks."""
    return weight_bytes(config) / size + MIN_CACHE < USABLE * node.gpu.memory


def table() -> list[str]:
    """Return the lines of the Markdown table."""
    lines = ["| Model | Node | Step | ms on one rank | " + " | ".join(f"{size} ranks" for size in SIZES) + " |"]
    lines.append("|---" * (4 + len(SIZES)) + "|")
    for name, config in models().items():
        for node in NODES:
            for label, of in STEPS.items():
                alone = seconds(node.gpu.ceilings, step(config, of))
                cells = [f"{alone * 1e3:.1f}" + ("" if fits(node, config, 1) else " *")]
                for size in SIZES:
                    took, sent = step_seconds(node, config, of, size, whole_experts=False)
                    whole, _ = step_seconds(node, config, of, size, whole_experts=True)
                    star = "" if fits(node, config, size) else " *"
                    cells.append(f"{alone / took:.2f} ({100 * sent / took:.0f}%), {alone / whole:.2f}{star}")
                lines.append(f"| {name} | {node.name} | {label} | " + " | ".join(cells) + " |")
    return lines


def one_shot_table() -> list[str]:
    """Return the lines of the Markdown table of what small gathers would save."""
    lines = ["| Node | Step | " + " | ".join(f"{size} ranks" for size in SIZES) + " |"]
    lines.append("|---" * (2 + len(SIZES)) + "|")
    config = models()["Phi-3.5-MoE"]
    for node in (node for node in NODES if "NVLink" in node.name):
        for label, of in STEPS.items():
            cells = []
            for size in SIZES:
                took, sent = step_seconds(node, config, of, size, whole_experts=False)
                sizes = list(gathers(config, of, whole_experts=False))
                saved = sent - sum(one_shot_seconds(node, size, *one) for one in sizes)
                cells.append(f"{saved * 1e3:.2f} of {took * 1e3:.2f} ms ({100 * saved / took:.0f}%)")
            lines.append(f"| {node.name} | {label} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one-shot", action="store_true", help="print what small gathers through shared memory save")
    print("\n".join(one_shot_table() if parser.parse_args().one_shot else table()))


if __name__ == "__main__":
    main()
