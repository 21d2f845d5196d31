"""Measure the operations of a decode step on the CPU, each compared with plain torch in the same run.

    python benchmarks/bench_ops.py [--sequences 16,64] [--rounds 20] [--threads 2] [--save]

Shapes are those of bench_engine.py's model in bf16. Weights and caches are used in turn from more copies than the CPU's
cache holds, as in a step. Our version and the plain one alternate; the shortest time of all rounds counts. With one
thread it is CPU time, which other processes disturb less, else wall time. GB/s counts the weights, or keys and values,
that are read.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import report
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moray.kernels.activation import SWIGLU
from moray.kernels.cpu.experts import PackedExperts, experts, pack_expert
from moray.kernels.cpu.linear import PackedLinear, linear, pack
from moray.kernels.cpu.norms import layer_norm
from moray.kernels.cpu.paged_attention import CpuAttentionMetadata, new_key_cache, new_value_cache, paged_attention
from moray.kernels.cpu.rope import rotate
from moray.kernels.cpu.rope_kv import rope_kv
from moray.kernels.cpu.route import sparsemixer

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_EXPERTS, VOCAB = 1024, 1600, 8, 16, 32064
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 4, 64, 16
DTYPE = torch.bfloat16
CONTEXTS = (16, 224)
COLD_BYTES = 200e6  # bytes of weights that are used in turn: more than the caches hold

Call = Callable[[], object]


@dataclass(frozen=True)
class Op:
    """Describes an operation.

    per_step:   calls in a decode step
    num_bytes:  bytes of weights or cache that a call reads
    plain:      the same computed by plain torch; None = there is nothing to compare with
    """

    name: str
    per_step: int
    num_bytes: float
    ours: Call
    plain: Call | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[16, 64])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    results = {}
    with torch.inference_mode():
        weights = Weights()
        for num_sequences in args.sequences:
            rows = [measure(op, args.rounds, clock) for op in make_ops(num_sequences, weights)]
            results[str(num_sequences)] = rows
            show(num_sequences, rows)
    if args.save:
        context = report.context("torch") | {"threads": args.threads, "rounds": args.rounds}
        print(report.save("ops", f"cpu{args.threads}", context | {"steps": results}))


class Weights:
    """Holds so many copies of each weight that none is still in the cache when its turn comes again."""

    def __init__(self) -> None:
        self.plain: dict[tuple[int, int], list[Tensor]] = {}
        self.packed: dict[tuple[int, int], list[PackedLinear]] = {}
        qkv = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        for shape in ((qkv, HIDDEN), (HIDDEN, NUM_HEADS * HEAD_DIM), (NUM_EXPERTS, HIDDEN), (VOCAB, HIDDEN)):
            copies = min(64, max(2, int(COLD_BYTES / (shape[0] * shape[1] * 2))))
            self.plain[shape] = [(torch.randn(shape) * 0.02).to(DTYPE) for _ in range(copies)]
            self.packed[shape] = [pack(w, torch.zeros(shape[0], dtype=DTYPE)) for w in self.plain[shape]]
        self.experts: list[tuple[Tensor, Tensor]] = []
        self.packed_experts: list[PackedExperts] = []
        for _ in range(2):
            up = (torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN) * 0.02).to(DTYPE)
            down = (torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE) * 0.02).to(DTYPE)
            self.experts.append((up, down))
            packed = (pack_expert(u, d, activation=SWIGLU) for u, d in zip(up, down, strict=True))
            self.packed_experts.append(PackedExperts(packed))


def make_ops(n: int, weights: Weights) -> list[Op]:
    x = torch.randn(n, HIDDEN).to(DTYPE)
    ops = [linear_op(name, x, per_step, shape, weights) for name, per_step, shape in LINEARS]
    return [*ops, experts_op(x, weights), *attention_ops(n), *small_ops(x)]


LINEARS = (
    ("qkv_proj", NUM_LAYERS, ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN)),
    ("o_proj", NUM_LAYERS, (HIDDEN, NUM_HEADS * HEAD_DIM)),
    ("gate", NUM_LAYERS, (NUM_EXPERTS, HIDDEN)),
    ("lm_head", 1, (VOCAB, HIDDEN)),
)


def linear_op(name: str, x: Tensor, per_step: int, shape: tuple[int, int], weights: Weights) -> Op:
    packed, plain = itertools.cycle(weights.packed[shape]), itertools.cycle(weights.plain[shape])
    bias = torch.zeros(shape[0], dtype=DTYPE)
    num_bytes = shape[0] * shape[1] * 2
    return Op(name, per_step, num_bytes, lambda: linear(x, next(packed)), lambda: F.linear(x, next(plain), bias))


def experts_op(x: Tensor, weights: Weights) -> Op:
    n = len(x)
    ids = torch.rand(n, NUM_EXPERTS).argsort(dim=1)[:, :2].contiguous()
    topk_weights = torch.rand(n, 2)
    packed, plain = itertools.cycle(weights.packed_experts), itertools.cycle(weights.experts)
    num_hit = len(set(ids.flatten().tolist()))
    num_bytes = num_hit * 3 * INTERMEDIATE * HIDDEN * 2
    return Op(
        f"experts ({num_hit} hit)",
        NUM_LAYERS,
        num_bytes,
        lambda: experts(x, topk_weights, ids, next(packed)),
        lambda: plain_experts(x, topk_weights, ids, *next(plain)),
    )


def plain_experts(x: Tensor, topk_weights: Tensor, ids: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute the experts one after the other, as a first version would: two linears and index_add for each."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for e in range(NUM_EXPERTS):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        if len(tokens):
            gate, linear_part = F.linear(x[tokens], up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * linear_part, down[e])
            out.index_add_(0, tokens, y * topk_weights[tokens, slots, None])
    return out.to(x.dtype)


def attention_ops(n: int) -> list[Op]:
    rng = random.Random(1)
    lengths = [rng.randint(*CONTEXTS) for _ in range(n)]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = list(range(sum(counts)))
    rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    batch = CpuAttentionMetadata.build([1] * n, lengths, tables, BLOCK_SIZE)
    q = torch.randn(n, NUM_HEADS, HEAD_DIM).to(DTYPE)
    qkv = torch.randn(n, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM).to(DTYPE)
    cos, sin = torch.randn(n, HEAD_DIM // 2), torch.randn(n, HEAD_DIM // 2)
    shape = sum(counts), NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM
    caches = [
        (new_key_cache(*shape, DTYPE).normal_(), new_value_cache(*shape, DTYPE).normal_())
        for _ in range(NUM_LAYERS * 3)
    ]
    ours, plain, written = itertools.cycle(caches), itertools.cycle(caches), itertools.cycle(caches)
    num_bytes = sum(lengths) * NUM_KV_HEADS * HEAD_DIM * 2 * 2

    def build() -> object:
        return CpuAttentionMetadata.build([1] * n, lengths, tables, BLOCK_SIZE)

    return [
        Op(
            "paged_attention",
            NUM_LAYERS,
            num_bytes,
            lambda: paged_attention(q, *next(ours), batch, HEAD_DIM**-0.5),
            lambda: plain_attention(q, *next(plain), lengths, tables),
        ),
        Op(
            "rope_kv",
            NUM_LAYERS,
            qkv.nbytes,
            lambda: rope_kv(qkv, cos, sin, *next(written), batch.slots, NUM_HEADS),
        ),
        Op("CpuAttentionMetadata", 1, 0, build),
    ]


def plain_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], tables: list[list[int]]) -> Tensor:
    """Gather each sequence's keys and values, then use torch's attention."""
    outs = []
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        k, v = (cache[table].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (k_cache, v_cache))
        outs.append(F.scaled_dot_product_attention(q[i, None, :, None], k, v, enable_gqa=True)[0, :, 0])
    return torch.stack(outs)


def small_ops(x: Tensor) -> list[Op]:
    n = len(x)
    ones = torch.ones(HIDDEN, dtype=DTYPE)
    heads = torch.randn(n, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM).to(DTYPE)
    angles = torch.randn(n, HEAD_DIM // 2)
    router_logits = torch.randn(n, NUM_EXPERTS).to(DTYPE)
    logits = torch.randn(n, VOCAB).to(DTYPE)
    return [
        Op("layer_norm", 2 * NUM_LAYERS + 1, 0, lambda: layer_norm(x, ones, ones, 1e-5)),
        Op("rotate q", NUM_LAYERS, 0, lambda: rotate(heads[:, :NUM_HEADS], angles, angles)),
        Op("rotate k", NUM_LAYERS, 0, lambda: rotate(heads[:, NUM_HEADS : NUM_HEADS + NUM_KV_HEADS], angles, angles)),
        Op("sparsemixer", NUM_LAYERS, 0, lambda: sparsemixer(router_logits, 0.01)),
        Op("residual add", 2 * NUM_LAYERS, 0, lambda: x + x),
        Op("best tokens", 1, logits.nbytes, lambda: logits.max(1), lambda: logits.argmax(1)),
    ]


def measure(op: Op, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the figures of an operation, from the shortest time of all rounds."""
    calls = [op.ours] if op.plain is None else [op.ours, op.plain]
    best = [float("inf")] * len(calls)
    for call in calls * 2:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            started = clock()
            call()
            best[i] = min(best[i], clock() - started)
    row = {"op": op.name, "per_step": op.per_step, "ms": best[0] * 1e3, "step_ms": best[0] * 1e3 * op.per_step}
    row["gb_per_s"] = op.num_bytes / best[0] / 1e9 if op.num_bytes else None
    row["plain_over_ours"] = best[1] / best[0] if op.plain else None
    return row


def show(num_sequences: int, rows: list[dict[str, Any]]) -> None:
    total = sum(row["step_ms"] for row in rows)
    table = Table(title=f"a decode step of {num_sequences} sequences: {total:.1f} ms", title_justify="left")
    for name in ("operation", "ms", "x a step", "ms a step", "GB/s", "plain torch / ours"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in rows:
        rate, ratio = row["gb_per_s"], row["plain_over_ours"]
        table.add_row(
            row["op"],
            f"{row['ms']:.3f}",
            str(row["per_step"]),
            f"{row['step_ms']:.2f}",
            "" if rate is None else f"{rate:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
