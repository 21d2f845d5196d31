"""Choose the tile of a GEMM: from a table measured on this GPU with this version of Triton, else by default rules.

Tables are JSON files in tiles/, written by benchmarks/tune.py, one for each operation, weight shape, dtype, format,
device and version of Triton (a table tuned with another version can be slower than the rules):

    {"capability": [9, 0],
     "tiles": {"32": {"block_m": 16, "block_n": 128, "group_m": 8, "num_warps": 4, "num_stages": 5}}}

"32" is the number of rows that the tile was tuned for. A tile's block_k follows from the dtype and the format alone:
sums over k are cut the same way whatever the number of rows and of outputs. So a result is bitwise independent of the
other rows, and of how many outputs of the weight a rank has.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.weight_formats import CODE_BITS, PACKED_BLOCK_K, Format

FOLDER = Path(__file__).parent / "tiles"
BLOCK_K = 64  # of dense weights in 16 bits
FP32_BLOCK_K = 32  # of dense weights in fp32
MULTIPROCESSORS = 132  # in an H100 or H200
MIN_PROGRAMS = 2 * MULTIPROCESSORS  # with fewer programs, multiprocessors would be without work
MAX_STAGES = 8
RESERVED_BYTES = 1024  # of shared memory, which the system takes of each thread block


@dataclass(frozen=True)
class Gpu:
    """Holds the properties of a GPU that the choice of tiles depends on.

    name:           the name that tables use
    capability:     compute capability
    shared_memory:  bytes of shared memory that one thread block may use
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def has_wide_mma(self) -> bool:
        """Return whether the GPU multiplies from shared memory (Hopper, data center Blackwell), so that wide tiles pay.

        Larger capabilities do not imply it: 12.0 is workstation Blackwell, with the instructions and memory of Ampere.
        """
        return self.capability[0] in (9, 10)


@dataclass(frozen=True)
class TileConfig:
    """Holds a program's blocks, [block_m, block_k] x [block_k, block_n] at a time, and its compile options.

    group_m: number of neighbouring row blocks that use a block of weights before the next one is read
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# Tiles for many rows on GPUs with wide MMA, widest first; the first takes 192 KB of shared memory.
WIDE_TILES = (
    TileConfig(128, 256, BLOCK_K, 16, 8, 4),
    TileConfig(128, 128, BLOCK_K, 16, 8, 4),
    TileConfig(64, 128, BLOCK_K, 16, 4, 4),
    TileConfig(64, 64, BLOCK_K, 16, 4, 5),
)


@dataclass(frozen=True)
class Key:
    """Describes a GEMM: its weight, [num_experts, n, k], and the dtype of the product; linear layers have 1 expert.

    format:     how the weight is stored; dense: in the dtype of the product
    group_size: inputs of a quantized weight that share a scale; 0 = all
    """

    n: int
    k: int
    dtype: torch.dtype
    num_experts: int = 1
    format: Format = "dense"
    group_size: int = 0

    @property
    def block_k(self) -> int:
        """Return the inputs that every tile for this weight multiplies at a time."""
        if self.format != "dense":
            return PACKED_BLOCK_K[self.format]
        return FP32_BLOCK_K if self.dtype == torch.float32 else BLOCK_K

    def shared_bytes(self, tile: TileConfig) -> int:
        """Return an upper bound of the shared memory of all stages; before Hopper the compiler uses one stage less."""
        x_bits = weight_bits = 8 * self.dtype.itemsize
        if self.format != "dense":
            weight_bits = CODE_BITS[self.format]
            x_bits = 8 if self.format == "fp8_fp8" else x_bits
        return (tile.block_m * x_bits + tile.block_n * weight_bits) * tile.block_k * tile.num_stages // 8

    def fits(self, tile: TileConfig, gpu: Gpu) -> bool:
        """Return whether the GPU has the shared memory for all stages, and for the product before it is stored."""
        return max(self.shared_bytes(tile), tile.block_m * tile.block_n * self.dtype.itemsize) <= gpu.shared_memory


def select_tile(op: str, key: Key, m: int) -> TileConfig:
    """Return the tile for m rows, which are the rows of all experts together.

    A number of rows between two entries of the table uses the larger entry; beyond the table it uses the largest.
    """
    return _select_tile(FOLDER, op, key, m, device())


@cache
def _select_tile(folder: Path, op: str, key: Key, m: int, gpu: Gpu) -> TileConfig:
    if table := _table(folder, op, key, gpu.name):
        return table[min((rows for rows in table if rows >= m), default=max(table))]
    return default_tile(key, m, gpu)


@cache
def default_tile(key: Key, m: int, gpu: Gpu) -> TileConfig:
    """Return a reasonable tile for a GPU without a table.

    If the GPU's shared memory is small, the tile has fewer stages, which changes no bit of the results.
    """
    tile = _preferred_tile(key, m, gpu)
    while tile.num_stages > 1 and not key.fits(tile, gpu):
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def _preferred_tile(key: Key, m: int, gpu: Gpu) -> TileConfig:
    if key.format != "dense":
        return _preferred_packed_tile(key, m, gpu)
    if key.dtype == torch.float32:
        return TileConfig(16, 64, FP32_BLOCK_K, 8, 4, 2)
    # Routing is uneven: a block of twice the average number of rows holds all rows of most experts.
    rows = m / key.num_experts
    # Narrow blocks if wide ones would leave multiprocessors without work.
    block_n = 64 if min(m, key.num_experts) * cdiv(key.n, 128) < MIN_PROGRAMS else 128
    if rows <= 8:
        return _deepened(TileConfig(16, block_n if gpu.has_wide_mma else 64, BLOCK_K, 8, 4, 5), key, m, gpu)
    if rows <= 64:
        return _deepened(TileConfig(32 if rows <= 32 else 64, block_n, BLOCK_K, 8, 4, 4), key, m, gpu)
    if not gpu.has_wide_mma:
        return TileConfig(128, 128, BLOCK_K, 16, 8, 3)
    wide = WIDE_TILES if gpu.capability[0] == 9 else WIDE_TILES[1:]  # Blackwell's epilogue spills with 256 columns
    if key.num_experts > 1:  # any tile gives enough programs; both GEMMs of the experts need the same block_m
        return wide[0]
    return min(wide, key=lambda tile: _clocks(tile, key.n, m))


def _deepened(tile: TileConfig, key: Key, m: int, gpu: Gpu) -> TileConfig:
    """Return the tile of few rows with more stages, if there are so few programs that the memory would not be busy.

    A multiprocessor gets some of the programs, which share its memory; each has a block of weights under way in all of
    its stages but one.
    """
    if tile.block_n > 64 or key.n < tile.block_n:
        return tile
    programs = min(m, key.num_experts) * cdiv(key.n, tile.block_n)
    memory = (gpu.shared_memory + RESERVED_BYTES) // cdiv(programs, MULTIPROCESSORS) - RESERVED_BYTES
    stages = min(MAX_STAGES, memory // key.shared_bytes(replace(tile, num_stages=1)))
    return replace(tile, num_stages=max(tile.num_stages, stages))


def _preferred_packed_tile(key: Key, m: int, gpu: Gpu) -> TileConfig:
    """Return the tile of a quantized weight. Rows of experts get the blocks that dense weights get.

    Codes become numbers in registers, and sums of groups have registers of their own, so tiles are narrower or have
    more warps than dense ones.
    """
    assert key.format != "dense"
    block_k, rows = key.block_k, m / key.num_experts
    if key.dtype == torch.float32:
        return TileConfig(16, 64, block_k, 8, 4, 2)
    block_n = 64 if min(m, key.num_experts) * cdiv(key.n, 128) < MIN_PROGRAMS else 128
    is_linear = key.num_experts == 1
    if rows <= 8:
        if not gpu.has_wide_mma:
            return TileConfig(16, 64, block_k, 8, 4, 4)
        # With 4 warps the compiler would wait after each MMA of the linear kernel's narrow tile.
        return TileConfig(16, block_n, block_k, 8, 8 if is_linear and block_n == 64 else 4, 4)
    has_small_groups = 0 < key.group_size < block_k  # each block has several sums beside the total
    if rows <= 32:
        return TileConfig(32, block_n, block_k, 8, 8 if has_small_groups else 4, 3)
    if rows <= 64:
        return TileConfig(64, block_n, block_k, 8, 8, 3)
    if has_small_groups:
        return TileConfig(64, 128, block_k, 16, 8, 3)
    block_n = 128 if gpu.has_wide_mma or key.group_size == 0 else 64
    if gpu.capability[0] == 10 and key.format == "fp8_fp8":  # Blackwell's epilogue spills
        block_n = 64
    if is_linear and gpu.capability[0] == 9 and key.group_size == 0 and key.format in ("int8", "fp8"):
        block_n = 256
    return TileConfig(128, block_n, block_k, 16, 8, 3)


def _clocks(tile: TileConfig, n: int, m: int) -> int:
    """Estimate the clock cycles of a Hopper multiprocessor for one block of k.

    A multiprocessor does 4,096 operations per clock, gets some 64 bytes from the L2 cache, and runs one program after
    the other.
    """
    programs = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    multiplied = tile.block_m * tile.block_n * tile.block_k // 2048
    loaded = (tile.block_m + tile.block_n) * tile.block_k * 2 // 64
    return cdiv(programs, MULTIPROCESSORS) * max(multiplied, loaded)


def tiles_in_use(op: str, key: Key, gpu: Gpu) -> list[TileConfig]:
    """Return all tiles of the default rules, and of the tables of GPUs of this capability, to compile ahead of time."""
    tiles = dict.fromkeys(default_tile(key, m, gpu) for m in range(1, 1 << 14, 31))
    for path in sorted(FOLDER.glob(table_name(op, key, "*", "*"))):
        if tuple(json.loads(path.read_text())["capability"]) == gpu.capability:
            tiles.update(dict.fromkeys(read_table(path, key.block_k).values()))
    return list(tiles)


def table_name(op: str, key: Key, device: str, triton_version: str) -> str:
    """Return the file name of a table."""
    dtype = str(key.dtype).removeprefix("torch.")
    if key.format != "dense":
        dtype += f"_{key.format}" + (f"-g{key.group_size}" if key.group_size else "")
    return f"{op}_e{key.num_experts}_n{key.n}_k{key.k}_{dtype}_{device}_triton{triton_version}.json"


@cache
def _table(folder: Path, op: str, key: Key, device_name: str) -> dict[int, TileConfig]:
    """Return the table, or an empty one if there is none. A table is read once."""
    path = folder / table_name(op, key, device_name, triton.__version__)
    return read_table(path, key.block_k) if path.exists() else {}


def read_table(path: Path, block_k: int) -> dict[int, TileConfig]:
    """Read a table: number of rows -> tile. block_k: of its key"""
    tiles = json.loads(path.read_text())["tiles"]
    return {int(rows): TileConfig(block_k=block_k, **tile) for rows, tile in tiles.items()}


def write_table(path: Path, capability: tuple[int, int], tiles: dict[int, TileConfig]) -> None:
    """Write a table. tiles: number of rows -> tile"""
    rows = {str(m): {name: size for name, size in vars(tiles[m]).items() if name != "block_k"} for m in sorted(tiles)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"capability": capability, "tiles": rows}, indent=1) + "\n")


@cache
def device() -> Gpu:
    """Return this machine's GPU; without one, return an Ampere for the interpreter."""
    if not torch.cuda.is_available():
        return Gpu("interpreter", (8, 0), 166_912)
    properties = torch.cuda.get_device_properties()
    name = properties.name.lower().replace(" ", "-")
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stub lacks it
    return Gpu(name, (properties.major, properties.minor), shared_memory)
