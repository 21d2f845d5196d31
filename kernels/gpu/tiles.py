"""Which tile a GEMM runs with: from a table measured on this card with this Triton, else by a rule.

Tables are JSON files in tiles/, written by benchmarks/tune.py, one for each operation, weight shape, dtype, device and
version of Triton (a table tuned under another version can lose to the rule):

    {"capability": [9, 0], "block_k": 64,
     "tiles": {"32": {"block_m": 16, "block_n": 128, "group_m": 8, "num_warps": 4, "num_stages": 5}}}

"32" is the number of rows that the tile was tuned for. block_k stands once in a table: sums over k are cut alike
whatever the number of rows, so that a row's result is bitwise independent of the rows around it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).with_suffix("")
BLOCK_K = 64  # the rule's, for every number of rows
MULTIPROCESSORS = 132  # of an H100 or H200
ENOUGH_PROGRAMS = 2 * MULTIPROCESSORS


@dataclass(frozen=True)
class Tile:
    """What one program multiplies, [block_m, block_k] x [block_k, block_n] at a time, and how it is compiled.

    group_m: so many neighbouring row blocks share a block of the weights before the next is read
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# For many rows on Hopper, the widest first, which takes 192 KB of shared memory.
WIDE_TILES = (
    Tile(128, 256, BLOCK_K, 16, 8, 4),
    Tile(128, 128, BLOCK_K, 16, 8, 4),
    Tile(64, 128, BLOCK_K, 16, 4, 4),
    Tile(64, 64, BLOCK_K, 16, 4, 5),
)


@dataclass(frozen=True)
class Key:
    """A weight [num_experts, n, k] (a dense linear is one expert) in the dtype in which it is multiplied."""

    n: int
    k: int
    dtype: torch.dtype
    num_experts: int = 1


def choose(op: str, key: Key, m: int) -> Tile:
    """The tile for m rows, those of all experts counted together.

    A number of rows between two in the table takes the tile of the larger one, beyond the table that of the largest.
    """
    name, capability = device()
    if table := _table(FOLDER, op, key, name):
        return table[min((rows for rows in table if rows >= m), default=max(table))]
    return default_tile(key, m, capability)


@cache
def default_tile(key: Key, m: int, capability: tuple[int, int]) -> Tile:
    """A sane tile for a card without a table."""
    if key.dtype == torch.float32:
        return Tile(16, 64, 32, 8, 4, 2)
    # Routing is uneven: a block of twice the average rows holds most experts' whole.
    rows = m / key.num_experts
    # Narrow blocks where wide ones would leave multiprocessors without work.
    block_n = 64 if min(m, key.num_experts) * triton.cdiv(key.n, 128) < ENOUGH_PROGRAMS else 128
    is_hopper = capability >= (9, 0)
    if rows <= 8:
        return Tile(16, block_n if is_hopper else 64, BLOCK_K, 8, 4, 5)
    if rows <= 64:
        return Tile(32 if rows <= 32 else 64, block_n, BLOCK_K, 8, 4, 4)
    if not is_hopper:  # fits the 100 KB of shared memory of Ampere's smaller cards as well
        return Tile(128, 128, BLOCK_K, 16, 8, 3)
    if key.num_experts > 1:  # enough programs for any tile; both GEMMs of the experts want one block_m
        return WIDE_TILES[0]
    return min(WIDE_TILES, key=lambda tile: _clocks(tile, key.n, m))


def _clocks(tile: Tile, n: int, m: int) -> int:
    """Roughly, of a Hopper multiprocessor for one block of k: it does 4,096 operations a clock and gets some 64 bytes
    from the L2 cache, and one program runs after the other."""
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    multiplied = tile.block_m * tile.block_n * tile.block_k // 2048
    loaded = (tile.block_m + tile.block_n) * tile.block_k * 2 // 64
    return triton.cdiv(programs, MULTIPROCESSORS) * max(multiplied, loaded)


def tiles_in_use(op: str, key: Key, capability: tuple[int, int]) -> list[Tile]:
    """All tiles that the rule and the tables of cards of this capability hold, for compiling them ahead of time."""
    found = dict.fromkeys(default_tile(key, m, capability) for m in range(1, 1 << 14, 31))
    for path in sorted(FOLDER.glob(table_name(op, key, "*", "*"))):
        if tuple(json.loads(path.read_text())["capability"]) == capability:
            found.update(dict.fromkeys(read_table(path).values()))
    return list(found)


def table_name(op: str, key: Key, device: str, triton_version: str) -> str:
    dtype = str(key.dtype).removeprefix("torch.")
    return f"{op}_e{key.num_experts}_n{key.n}_k{key.k}_{dtype}_{device}_triton{triton_version}.json"


@cache
def _table(folder: Path, op: str, key: Key, device_name: str) -> dict[int, Tile]:
    """Empty where there is none. Read once."""
    path = folder / table_name(op, key, device_name, triton.__version__)
    return read_table(path) if path.exists() else {}


def read_table(path: Path) -> dict[int, Tile]:
    """Number of rows -> tile."""
    table = json.loads(path.read_text())
    return {int(rows): Tile(block_k=table["block_k"], **tile) for rows, tile in table["tiles"].items()}


def write_table(path: Path, capability: tuple[int, int], tiles: dict[int, Tile]) -> None:
    """tiles: number of rows -> tile, all with one block_k."""
    (block_k,) = {tile.block_k for tile in tiles.values()}
    rows = {str(m): {name: size for name, size in vars(tiles[m]).items() if name != "block_k"} for m in sorted(tiles)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"capability": capability, "block_k": block_k, "tiles": rows}, indent=1) + "\n")


@cache
def device() -> tuple[str, tuple[int, int]]:
    """This machine's card, as tables name it, and its compute capability; without one, Ampere's for the interpreter."""
    if not torch.cuda.is_available():
        return "interpreter", (8, 0)
    return torch.cuda.get_device_name().lower().replace(" ", "-"), torch.cuda.get_device_capability()
