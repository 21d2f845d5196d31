"""Find out, once per machine and shape of a linear layer, which path keeps the promises of `linear`.

A path passes the check when rows have the same bits in batches of different sizes and at different positions in them,
and are right within the dtype's tolerance. The first path that passes is used. If `keep_results_in` names a folder,
results are kept in a file there, so that the next start need not check again.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from moray.kernels.cpu import kept_checks, quantized
from moray.kernels.cpu.kept_checks import LinearCheck
from moray.kernels.cpu.linear import PackedLinear, pack, paths
from moray.kernels.cpu.linear_mistakes import (
    Quantization,
    find_mistakes,
    find_quantized_mistakes,
    make_quantized,
    make_weight,
)
from moray.kernels.cpu.quantized import PackedQuantized, pack_quantized
from moray.kernels.cpu.thread_pool import single_threaded

logger = logging.getLogger(__name__)


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
                    kept_checks.write(_folder, result)
            _results[key] = result
        return _results[key]


def _find_kept(layer: Layer, candidates: tuple[str, ...]) -> LinearCheck | None:
    """Return the file's result for this layer, or None if it has none or an impossible one."""
    kept = kept_checks.read(_folder).get(str(layer.result("")))
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
