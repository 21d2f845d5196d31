"""Find the fastest tiles of the GEMMs on this GPU and write the tables that kernels/gpu/tuning.py reads.

    python benchmarks/tune.py [--only "phi-3.5-moe experts"] [--tokens 1,32,2048] [--out FOLDER]

Needs only torch and triton. Every tile that may be the fastest and fits the GPU is timed at every number of tokens, by
replays of a CUDA graph; weights are used in turn from more memory than the L2 cache holds, as in a step. Each token
goes to two random experts. The two GEMMs of the experts get the same block_m at each number of tokens: the one with the
shortest time in total. Programs are compiled beforehand, on all cores.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import triton
from gpu.measure import replayed
from torch import Tensor
from triton.errors import TritonError

from moray.kernels.gpu import tuning as tiles
from moray.kernels.gpu.experts_down import experts_down
from moray.kernels.gpu.experts_up import experts_up
from moray.kernels.gpu.grouped_gemm import SHAPES, ExpertShape
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.route import Routing, route
from moray.kernels.gpu.tuning import MAX_STAGES, Gpu, Key, TileConfig, select_tile, table_name, write_table

TOP_K = 2
TOKENS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096]
BLOCK_MS = (16, 32, 64, 128, 256)
COLD_BYTES = 1 << 30  # bytes of weights that are used in turn
TURNS = 4  # routings that are used in turn

Call = Callable[[], object]


@dataclass(frozen=True)
class Gemm:
    """Describes a GEMM to tune.

    rows_per_token:  rows of the product for each token
    calls:           makes a call for each turn, from the number of tokens and the tile
    """

    op: str
    key: Key
    rows_per_token: int
    calls: Callable[[int, TileConfig], list[Call]]


def problems() -> dict[str, Callable[[], list[Gemm]]]:
    """Return name -> a function that makes the inputs of the GEMMs that get the same block_m, and these GEMMs."""
    found: dict[str, Callable[[], list[Gemm]]] = {f"{shape.name} experts": partial(experts, shape) for shape in SHAPES}
    for n, k, dtype in [
        *((n, 4096, torch.bfloat16) for n in (6144, 4096, 32064, 32000)),  # Phi-3.5-MoE and Mixtral
        *((n, 2560, torch.float16) for n in (7680, 2560, 51200)),  # phixtral
    ]:
        found[f"linear {n}x{k}"] = partial(dense, Key(n, k, dtype))
    return found


def dense(key: Key) -> list[Gemm]:
    weights = _weights(key)

    def calls(num_tokens: int, tile: TileConfig) -> list[Call]:
        x = _inputs(num_tokens, key)
        return [partial(linear, x, weight[0], None, tile) for weight in weights]

    return [Gemm("linear", key, 1, calls)]


def experts(shape: ExpertShape) -> list[Gemm]:
    ups, downs = _weights(shape.up), _weights(shape.down)

    @cache
    def routings(num_tokens: int, block_m: int) -> list[Routing]:
        torch.manual_seed(num_tokens)  # the same experts for every block_m
        logits = torch.randn(TURNS, num_tokens, shape.num_experts, device="cuda").to(shape.dtype)
        return [route(one, method="softmax", top_k=TOP_K, jitter=0.0, block_m=block_m) for one in logits]

    def in_turn(weights: Tensor, num_tokens: int, tile: TileConfig) -> list[tuple[Tensor, Routing]]:
        turns, of_turn = range(max(TURNS, len(weights))), routings(num_tokens, tile.block_m)
        return [(weights[turn % len(weights)], of_turn[turn % TURNS]) for turn in turns]

    def up_calls(num_tokens: int, tile: TileConfig) -> list[Call]:
        x = _inputs(num_tokens, shape.up)
        turns = in_turn(ups, num_tokens, tile)
        return [partial(experts_up, x, up, routing, None, shape.activation, tile) for up, routing in turns]

    def down_calls(num_tokens: int, tile: TileConfig) -> list[Call]:
        turns = in_turn(downs, num_tokens, tile)
        hidden = _inputs(len(turns[0][1].sorted_rows), shape.down)
        return [partial(experts_down, hidden, down, routing, None, tile) for down, routing in turns]

    return [Gemm("experts_up", shape.up, TOP_K, up_calls), Gemm("experts_down", shape.down, TOP_K, down_calls)]


def _weights(key: Key) -> Tensor:
    """Return [copies, num_experts, n, k], with so many copies that the L2 cache does not have the next one."""
    copies = math.ceil(COLD_BYTES / (2 * key.num_experts * key.n * key.k))
    weights = torch.empty(copies, key.num_experts, key.n, key.k, dtype=key.dtype, device="cuda")
    return weights.normal_(std=key.k**-0.5)


def _inputs(num_rows: int, key: Key) -> Tensor:
    return torch.randn(num_rows, key.k, device="cuda", dtype=key.dtype)


def candidates(key: Key, num_rows: int, gpu: Gpu) -> list[TileConfig]:
    """Return the tiles that may be the fastest and fit the GPU, whose shared memory depends on its capability."""
    rows = num_rows / key.num_experts
    found = []
    for block_m, block_n in itertools.product(BLOCK_MS, (64, 128, 256)):
        if not min(rows / 4, 128) <= block_m <= max(32, 4 * rows):
            continue
        groups = (8,) if rows <= 64 else (4, 16)
        warps = (4, 8) if block_n >= 128 else (4,)  # two warp groups need 128 weights
        for group_m, num_warps, num_stages in itertools.product(groups, warps, range(3, MAX_STAGES + 1)):
            tile = TileConfig(block_m, block_n, key.block_k, group_m, num_warps, num_stages)
            # Fewer bytes in flight do not keep the memory busy; more than 128 accumulators a thread spill.
            is_busy = key.shared_bytes(tile) >= 24 << 10
            if is_busy and key.fits(tile, gpu) and block_m * block_n <= 128 * 32 * num_warps:
                found.append(tile)
    return found


def microseconds(calls: list[Call]) -> float:
    """Return the time of one call, by replays of a CUDA graph of all calls; infinite where the tile does not fit."""
    try:
        for call in calls:
            call()
    except TritonError:
        return math.inf
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    repeats = max(2, math.ceil(2 / replayed(graph, 1)))
    return 1000 * min(replayed(graph, repeats) for _ in range(3)) / len(calls)


@cache
def _gemms(problem: str) -> list[Gemm]:
    torch.manual_seed(0)
    return problems()[problem]()


def compile_one(problem: str, i: int, tile: TileConfig) -> None:
    """Compile a program into Triton's cache on disk."""
    try:
        _gemms(problem)[i].calls(1, tile)[0]()
        torch.cuda.synchronize()
    except TritonError:
        pass  # timed as infinite later


def compile_all(problem: str, programs: set[tuple[int, TileConfig]]) -> None:
    print(f"{problem}: {len(programs)} programs to compile", flush=True)
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        for job in [pool.submit(compile_one, problem, i, tile) for i, tile in sorted(programs, key=str)]:
            job.result()


def best_tiles(times: list[dict[int, dict[TileConfig, float]]]) -> dict[int, list[TileConfig]]:
    """Return number of tokens -> the best tile of each GEMM, all with the same block_m.

    times: for each GEMM, number of tokens -> tile -> microseconds
    """
    by_tokens = {}
    for num_tokens in times[0]:
        together = []
        for block_m in BLOCK_MS:
            fitting = [{tile: t for tile, t in of[num_tokens].items() if tile.block_m == block_m} for of in times]
            if all(fitting):
                fastest = [min(of, key=lambda tile: of[tile]) for of in fitting]
                together.append((sum(of[tile] for of, tile in zip(fitting, fastest, strict=True)), fastest))
        by_tokens[num_tokens] = min(together, key=lambda pair: pair[0])[1]
    return by_tokens


def tune(problem: str, tokens: list[int], folder: Path) -> None:
    gemms = _gemms(problem)
    of_gemms = [{m: candidates(gemm.key, m * gemm.rows_per_token, tiles.device()) for m in tokens} for gemm in gemms]
    compile_all(problem, {(i, tile) for i, of in enumerate(of_gemms) for some in of.values() for tile in some})
    times = [
        {m: {tile: microseconds(gemm.calls(m, tile)) for tile in some} for m, some in of.items()}
        for gemm, of in zip(gemms, of_gemms, strict=True)
    ]
    best = best_tiles(times)
    gpu = tiles.device()
    for i, gemm in enumerate(gemms):
        print(f"{problem}, {gemm.op}: tokens, us with the best tile, us with the one taken so far, the best")
        for m, of_m in best.items():
            so_far = microseconds(gemm.calls(m, select_tile(gemm.op, gemm.key, m * gemm.rows_per_token)))
            print(f"  {m:5} {times[i][m][of_m[i]]:9.1f} {so_far:9.1f}  {of_m[i]}", flush=True)
        path = folder / table_name(gemm.op, gemm.key, gpu.name, triton.__version__)
        write_table(path, gpu.capability, {m * gemm.rows_per_token: of_m[i] for m, of_m in best.items()})
        print(f"wrote {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="problems whose name contains this")
    parser.add_argument("--tokens", type=_numbers, default=TOKENS)
    parser.add_argument("--out", type=Path, default=tiles.FOLDER, help="default: where the engine looks")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py times kernels on an NVIDIA GPU, and torch sees none on this machine.")
    names = [name for name in problems() if args.only in name]
    if not names:
        sys.exit(f"No problem's name contains {args.only!r}. There are: {', '.join(problems())}.")
    for name in names:
        tune(name, args.tokens, args.out)
        _gemms.cache_clear()
        torch.cuda.empty_cache()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
