"""Normalise the queries and keys of fused qkv rows on the CPU, in place."""

from typing import Any

import numpy as np
from numba import float32
from torch import Tensor

from moray.kernels.cpu.norms import rms_norm_ref
from moray.kernels.cpu.numba_intrinsics import array, compiled, narrow, widen
from moray.kernels.cpu.thread_pool import parallel_rows

LANES = 8  # partial sums of a row's squares, which are added up at its end


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float) -> None:
    """Apply an RMSNorm to each of the leading segments of every row: num_q of queries, then num_k of keys.

    A segment is a head, or all heads together. It is divided by its root mean square in fp32, rounded, and then scaled.
    The columns after the segments stay as they are.

    qkv:       [num_tokens, width], contiguous, changed in place
    q_weight:  [columns of a segment of queries]
    k_weight:  [columns of a segment of keys]
    """
    arrays = array(qkv), array(q_weight), array(k_weight)
    parallel_rows(lambda start, stop: _qk_norm(*arrays, num_q, num_k, np.float32(eps), start, stop), *qkv.shape)


@compiled
def _qk_norm(qkv: Any, q_weight: Any, k_weight: Any, num_q: int, num_k: int, eps: Any, start: int, stop: int) -> None:
    lanes = np.empty(LANES, np.float32)
    for t in range(start, stop):
        first = 0
        for segment in range(num_q + num_k):
            weight = q_weight if segment < num_q else k_weight
            x = qkv[t, first : first + len(weight)]
            first += len(weight)
            whole = len(x) // LANES * LANES
            lanes[:] = float32(0.0)
            for d in range(0, whole, LANES):
                for lane in range(LANES):
                    value = widen(x[d + lane])
                    lanes[lane] += value * value
            for d in range(whole, len(x)):
                value = widen(x[d])
                lanes[d - whole] += value * value
            total = float32(0.0)
            for lane in range(LANES):
                total += lanes[lane]
            scale = float32(1.0) / np.sqrt(total / float32(len(x)) + eps)
            for d in range(len(x)):
                rounded = narrow(widen(x[d]) * scale, x[d])
                x[d] = narrow(widen(rounded) * widen(weight[d]), x[d])


def qk_norm_ref(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float) -> None:
    """Compute `qk_norm` slowly and obviously, on any device."""
    q, k = num_q * len(q_weight), num_k * len(k_weight)
    for part, weight in ((qkv[:, :q], q_weight), (qkv[:, q : q + k], k_weight)):
        part.copy_(rms_norm_ref(part.reshape(len(part), -1, len(weight)), weight, eps).flatten(1))
