"""Find out, once per machine and shape of a linear layer, which path keeps the promises of `linear`.

A path passes the check when rows have the same bits in batches of different sizes and at different positions in them,
and are right within the dtype's tolerance. The first path that passes is used. If `keep_results_in` names a folder,
results are kept in a file there, so that the next start need not check again.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import llvmlite
import numba
import torch
from torch import Tensor

from moray.kernels.cpu import panels, quantized
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.linear import PackedLinear, linear, linear_ref, pack, paths
from moray.kernels.cpu.quantized import PackedQuantized, dequantize_ref, pack_quantized
from moray.kernels.cpu.quantized_calls import QuantizedLinear
from moray.kernels.cpu.quantized_panels import ZERO
from moray.kernels.cpu.thread_pool import num_cores, single_threaded, use_cores
from moray.kernels.e2m1 import EXPONENT_BIAS, scales_of

logger = logging.getLogger(__name__)

# Kept results are used only if these source files and these environment variables are unchanged.
FOLDER = Path(__file__).parent
SOURCES = (
    "epilogue.py",
    "linear.py",
    "numba_intrinsics.py",
    "onednn.py",
    "pair_product.py",
    "panels.py",
    "product.py",
    "quantized.py",
    "quantized_calls.py",
    "quantized_panels.py",
    "quantized_product.py",
    "quantized_rows.py",
    "quantized_tiles.py",
    "self_check.py",
    "tile_product.py",
    "tiles.py",
    "vector_product.py",
    "vectors.py",
)
VARIABLES = (
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_OPT",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)

NUM_ROWS = (1, 2, 7, 16, 33, 64, 130)  # batch sizes that are checked
MANY_ROWS = 513  # a large step, added for libraries that may choose their kernel by the number of rows
CHECKED_ROWS = 8  # rows that are compared with a reference
CHECKED_OUTPUTS = 256  # outputs at each end of a row that are compared, so that the reference stays cheap
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # relative to the largest result
PERIOD = 65521  # made-up weights repeat after this many; a prime, so that they repeat at other positions of a row


@dataclass(frozen=True)
class LinearCheck:
    """Holds the result of the check for one shape of a linear layer.

    dtype:        "bfloat16" | "float16" | "float32"
    path:         the path that is used: an instruction set (see isa.py), "onednn" or "plain"
    failed_paths: better paths, which fail on this machine
    weights:      how the weights are quantized, such as "int4 in groups of 128"; "" if they are in dtype
    """

    out_features: int
    in_features: int
    dtype: str
    path: str
    failed_paths: tuple[str, ...] = ()
    weights: str = ""

    def __str__(self) -> str:
        return f"{self.products} [{self.out_features}, {self.in_features}]"

    @property
    def products(self) -> str:
        """Return what is multiplied: the rows' dtype, and how the weights are quantized."""
        return f"{self.dtype} x {self.weights}" if self.weights else self.dtype


@dataclass(frozen=True)
class Quantization:
    """States how the weights of a layer are quantized; see PackedQuantized."""

    kind: str
    group_size: int
    has_zeros: bool

    def describe(self, in_features: int) -> str:
        """Return it in words, such as "int4 in groups of 128"."""
        groups = f" in groups of {self.group_size}" if self.group_size < in_features else ""
        return f"{self.kind}{groups}{' with zeros' if self.has_zeros else ''}"


@dataclass(frozen=True)
class Layer:
    """Holds the shape of a linear layer, the dtype of its rows, and how its weights are quantized if they are."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    quantization: Quantization | None = None

    def result(self, path: str, failed_paths: tuple[str, ...] = ()) -> LinearCheck:
        """Return the result in which a path is used."""
        weights = self.quantization.describe(self.in_features) if self.quantization else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return LinearCheck(self.out_features, self.in_features, dtype, path, failed_paths, weights)


_results: dict[tuple[Layer, tuple[str, ...]], LinearCheck] = {}
_lock = Lock()
_folder: Path | None = None


def keep_results_in(folder: Path | None) -> None:
    """Keep results in a file in this folder from now on, and use those already there. None = keep no results."""
    global _folder
    _folder = folder


def results() -> list[LinearCheck]:
    """Return the checks of all shapes that this process has packed or checked so far."""
    return list(_results.values())


def summary() -> str:
    """Return one line about the paths that the linear layers of this process use and the results of the checks."""
    used: dict[str, list[str]] = {}
    for result in results():
        if result.path not in used.setdefault(result.products, []):
            used[result.products].append(result.path)
    failed = [result for result in results() if result.failed_paths]
    products = ", ".join(f"{products} products: {' and '.join(by)}" for products, by in used.items())
    verdict = f": {len(failed)} left a path that failed" if failed else " passed"
    return f"{products}; self-check of {len(results())} shapes{verdict}"


def checked_pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack a weight for the best path that passes the check for its shape on this machine."""
    return pack(weight, bias, check(weight.shape[0], weight.shape[1], weight.dtype).path)


def checked_pack_quantized(
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    zeros: Tensor | None,
    kind: str,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> PackedQuantized:
    """Pack a quantized weight for the best path that passes the check for its shape on this machine.

    dtype: of the rows that are multiplied with it
    The rest is as for pack_quantized.
    """
    packed = pack_quantized(codes, scales, group_size, zeros, kind, bias)
    quantization = Quantization(kind, group_size, packed.zeros is not None)
    return replace(packed, path=check(codes.shape[0], codes.shape[1], dtype, quantization).path)


def check(
    out_features: int, in_features: int, dtype: torch.dtype, quantization: Quantization | None = None
) -> LinearCheck:
    """Return which path a linear layer of this shape uses; checked at the first call, or read from the file."""
    layer = Layer(out_features, in_features, dtype, quantization)
    candidates = paths(dtype) if quantization is None else quantized.paths(quantization.kind, dtype)
    key = layer, candidates
    with _lock:
        if key not in _results:
            result = _find_kept(layer, candidates)
            if result is None:
                result, has_raised = _find_path(layer, candidates)
                if not has_raised:  # else the next start may find more: memory may have been short
                    _write(result)
            _results[key] = result
        return _results[key]


def _find_kept(layer: Layer, candidates: tuple[str, ...]) -> LinearCheck | None:
    """Return the file's result for this layer, or None if it has none or an impossible one."""
    kept = _read().get(str(layer.result("")))
    if kept is None or kept.path not in candidates:
        return None
    expected = layer.result(kept.path, candidates[: candidates.index(kept.path)])
    return kept if kept == expected else None


def _find_path(layer: Layer, candidates: tuple[str, ...]) -> tuple[LinearCheck, bool]:
    """Return the result with the first path that passes, and whether a better path raised an exception."""
    failed: list[str] = []
    has_raised = False
    with single_threaded():
        find = _finder(layer)
        for path in candidates[:-1]:
            try:
                if next(find(path), None) is None:
                    break
            except Exception:  # from a compiler, or from an operation that this CPU does not support
                logger.debug("%s cannot multiply here", path, exc_info=True)
                has_raised = True
            failed.append(path)
        else:
            path = candidates[-1]
    return layer.result(path, tuple(failed)), has_raised


def _finder(layer: Layer) -> Callable[[str], Iterator[str]]:
    """Return the function that finds a path's mistakes with a made-up weight."""
    if layer.quantization is None:
        weight = make_weight(layer.out_features, layer.in_features, layer.dtype)
        return lambda path: find_mistakes(weight, path)
    made_up = make_quantized(layer.out_features, layer.in_features, layer.quantization)
    return lambda path: find_quantized_mistakes(made_up, layer.dtype, path)


def make_weight(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Return a made-up weight, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(PERIOD, generator=generator) * in_features**-0.5).to(dtype)
    return _repeat(numbers, out_features, in_features)


def make_quantized(
    out_features: int, in_features: int, quantization: Quantization
) -> tuple[Tensor, Tensor, int, Tensor | None, str]:
    """Return a made-up quantized weight as the first arguments of pack_quantized, the same at each call."""
    kind, group_size = quantization.kind, quantization.group_size
    generator = torch.Generator().manual_seed(0)
    groups = -(-in_features // group_size)
    if kind == "fp8":
        numbers = torch.randn(PERIOD, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "fp4":
        numbers = torch.randint(0, 16, (PERIOD,), generator=generator, dtype=torch.uint8)
    else:
        limit = ZERO[kind]
        numbers = torch.randint(-limit, limit, (PERIOD,), generator=generator, dtype=torch.int8)
    scales = torch.rand(out_features, groups, generator=generator) + 0.5
    if kind == "fp4":
        scales = scales_of((scales * 4).byte() + EXPONENT_BIAS)
    zeros = torch.randint(-8, 8, (out_features, groups), generator=generator, dtype=torch.int8)
    codes = _repeat(numbers, out_features, in_features)
    return codes, scales, group_size, zeros if quantization.has_zeros else None, kind


def _repeat(numbers: Tensor, rows: int, columns: int) -> Tensor:
    repeated: Tensor = numbers.view(-1).repeat(-(-rows * columns // len(numbers)))[: rows * columns]
    return repeated.view(rows, columns)


def find_mistakes(
    weight: Tensor, path: str, num_rows: Sequence[int] = (), core_counts: Sequence[int] = ()
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that the path computes. Raises what the path raises.

    num_rows:    batch sizes that are compared with the largest of them; by default those of the check at load
    core_counts: numbers of cores that are compared with the caller's
    """
    if not num_rows:
        num_rows = NUM_ROWS if (path, weight.dtype) in panels.KERNELS else (*NUM_ROWS, MANY_ROWS)
    packed = pack(weight, path=path)

    def reference(x: Tensor, part: slice) -> Tensor:
        return linear_ref(x, weight[part].float(), None)

    x = _made_up_rows(max(num_rows), weight.shape[1], weight.dtype)
    yield from _compare(lambda x: linear(x, packed), reference, x, num_rows, core_counts)


def find_quantized_mistakes(
    weight: tuple[Tensor, Tensor, int, Tensor | None, str],
    dtype: torch.dtype,
    path: str,
    num_rows: Sequence[int] = NUM_ROWS,
    core_counts: Sequence[int] = (),
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that the path computes. Raises what the path raises.

    weight: the first arguments of pack_quantized
    dtype:  of the rows
    The rest is as for find_mistakes.
    """
    codes, scales, group_size, zeros, _ = weight
    packed = pack_quantized(*weight, path=path)

    def reference(x: Tensor, part: slice) -> Tensor:
        of_part = codes[part], scales[part], group_size, None if zeros is None else zeros[part]
        return linear_ref(x, dequantize_ref(*of_part), None)

    x = _made_up_rows(max(num_rows), codes.shape[1], dtype)
    yield from _compare(QuantizedLinear(packed, dtype), reference, x, num_rows, core_counts)


def _made_up_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def _compare(
    multiply: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor, slice], Tensor],
    x: Tensor,
    num_rows: Sequence[int],
    core_counts: Sequence[int],
) -> Iterator[str]:
    """Yield a description of each mistake in the rows that `multiply` computes.

    reference: (fp32 rows, part of the outputs) -> what they should be
    """
    full = multiply(x)
    differing = [
        n
        for n in num_rows
        if not torch.equal(multiply(x[:n]), full[:n]) or not torch.equal(multiply(x[-n:]), full[-n:])
    ]
    if differing:
        yield f"other bits for {', '.join(map(str, differing))} rows than for {len(x)}"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    if not torch.equal(multiply(x[order]), full[order]):
        yield "other bits in another order of the rows"
    for count in core_counts:
        with use_cores(count):
            on_some_cores = multiply(x)
        if not torch.equal(on_some_cores, full):
            yield f"other bits on {count} of {num_cores()} cores than on all"
    for part in (slice(0, CHECKED_OUTPUTS), slice(-CHECKED_OUTPUTS, None)):
        expected = reference(x[:CHECKED_ROWS].float(), part)
        error = (full[:CHECKED_ROWS, part].float() - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE[x.dtype]:
            yield f"errors of {error:.2g} of the largest number"
            return


def _file() -> Path | None:
    return None if _folder is None else _folder / f"linear-checks-{_machine()}.json"


@cache
def _cpu() -> str:
    """Return the model and flags of the first CPU, from /proc/cpuinfo."""
    lines = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            if line.split(":")[0].strip() in ("model name", "flags", "CPU part", "Features"):
                lines.add(line)
    return "\n".join(sorted(lines)) or platform.processor() or platform.machine()


@cache
def _hash_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _machine() -> str:
    """Return a hash of everything that a result depends on."""
    versions = (torch.__version__, numba.__version__, llvmlite.__version__, _hash_sources(FOLDER))
    settings = (isas(), [os.environ.get(name) for name in VARIABLES])
    return hashlib.sha256(repr((_cpu(), settings, versions)).encode()).hexdigest()[:16]


def _read() -> dict[str, LinearCheck]:
    """Return the results in the file, without damaged entries; empty if the file is missing or damaged."""
    file, kept = _file(), {}
    if file is None:
        return {}
    with suppress(OSError, ValueError):
        entries: Any = json.loads(file.read_text())
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            with suppress(TypeError, ValueError, KeyError):
                entry = dict(entry)
                kept[name] = LinearCheck(**entry | {"failed_paths": tuple(entry["failed_paths"])})
    return kept


def _write(result: LinearCheck) -> None:
    """Add a result to the file, which is replaced as a whole. If it cannot be written, the next start checks again."""
    file = _file()
    if file is None:
        return
    entries = {name: asdict(kept) for name, kept in (_read() | {str(result): result}).items()}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(descriptor, "w") as out:
            json.dump(entries, out)
        os.replace(draft, file)
