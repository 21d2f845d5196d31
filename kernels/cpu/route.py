"""Routing: choose each token's experts and their weights from the router logits. Ties go to the lowest expert index."""

from typing import Any

import numba
import numpy as np
import torch
from numba import float32, uint32
from torch import Tensor

from moray.kernels.cpu.launch import launch
from moray.kernels.cpu.numba_intrinsics import CFunction, array_at, as_float, bits_of, exp, inlined, narrow, widen
from moray.kernels.routing import RoutingMethod, sparsemixer_threshold


def sparsemixer(router_logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose two experts per token as Phi-MoE does at inference; their weights (mostly 1.0 and 1.0) do not sum to 1.

    The weight of each of the two choices is a softmax, without the logits that are further than 2*jitter (relative)
    below the choice; the softmax of the second choice excludes the first. It is computed in fp32 from logits that were
    rounded to the model's dtype, which router_logits have. (modeling_phimoe.py, sparsemixer; SparseMixer-v2, arXiv
    2409.12136)

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, 2] fp32, expert ids [num_tokens, 2] int64
    """
    return _choose(router_logits, SPARSEMIXER, 2, sparsemixer_threshold(jitter, router_logits.dtype))


def softmax_topk(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts per token, weighted by the softmax over those k (Mixtral's rule, arXiv 2401.04088).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, summing to 1; expert ids [num_tokens, k] int64, best first
    """
    return _choose(router_logits, SOFTMAX, k)


def softmax_all(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts per token, weighted by the softmax over all experts (OLMoE's rule, arXiv 2409.02060).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, whose sum is below 1; expert ids [num_tokens, k] int64, best first
    """
    return _choose(router_logits, SOFTMAX_ALL, k)


def sigmoid_one(router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the only expert of each token, weighted by the sigmoid of its logit.

    router_logits: [num_tokens, 1]
    returns:       weights [num_tokens, 1] fp32; expert ids [num_tokens, 1] int64, all 0
    """
    return _choose(router_logits, SIGMOID, 1)


def _choose(router_logits: Tensor, method: int, k: int, limit: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return weights, [num_tokens, k] fp32, and ids, [num_tokens, k] int64. limit: of sparsemixer's gaps"""
    assert router_logits.is_contiguous(), f"strides {router_logits.stride()}"
    num_tokens, num_experts = router_logits.shape
    weights, ids = torch.empty(num_tokens, k), torch.empty(num_tokens, k, dtype=torch.int64)
    addresses = router_logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
    launch(_ROUTE[router_logits.dtype], (*addresses, method, num_tokens, num_experts, k, bits_of(limit)))
    return weights, ids


# The arguments: addresses, the method, sizes, and the bits of sparsemixer's limit.
LOGITS, WEIGHTS, IDS, METHOD, NUM_TOKENS, NUM_EXPERTS, TOP_K, LIMIT = range(8)
WORDS = 8
SPARSEMIXER, SOFTMAX, SOFTMAX_ALL, SIGMOID = range(4)


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _route(arguments: Any, stored: Any) -> None:
    """Choose the experts of all tokens."""
    words = array_at(arguments, (WORDS,), np.uint64)
    method, limit = words[METHOD], as_float(uint32(words[LIMIT]))
    num_tokens, num_experts, k = np.int64(words[NUM_TOKENS]), np.int64(words[NUM_EXPERTS]), np.int64(words[TOP_K])
    all_logits = array_at(words[LOGITS], (num_tokens, num_experts), stored)
    all_weights = array_at(words[WEIGHTS], (num_tokens, k), np.float32)
    all_ids = array_at(words[IDS], (num_tokens, k), np.int64)
    available = np.empty(num_experts, np.bool_)  # experts that have not been chosen
    for t in range(num_tokens):
        available[:] = True
        logits, weights, ids = all_logits[t], all_weights[t], all_ids[t]
        if method == SPARSEMIXER:
            _sparsemixer(logits, limit, available, weights, ids)
        elif method == SIGMOID:
            logit = widen(logits[0])
            e = exp(-abs(logit))
            weights[0] = (float32(1.0) if logit >= float32(0.0) else e) / (float32(1.0) + e)
            ids[0] = 0
        else:
            _softmax(logits, available, weights, ids, method == SOFTMAX_ALL)


def _route_bf16(arguments: Any, piece: Any) -> None:
    _route(arguments, np.uint16)


def _route_f16(arguments: Any, piece: Any) -> None:
    _route(arguments, np.int16)


def _route_fp32(arguments: Any, piece: Any) -> None:
    _route(arguments, np.float32)


_ROUTE = {
    torch.bfloat16: CFunction(_route_bf16),
    torch.float16: CFunction(_route_f16),
    torch.float32: CFunction(_route_fp32),
}


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _sparsemixer(logits: Any, limit: Any, available: Any, weights: Any, ids: Any) -> None:
    for choice in range(2):
        chosen = _best(logits, available)
        best = widen(logits[chosen])
        total = float32(0.0)
        for e in range(len(logits)):
            logit = widen(logits[e])
            gap = (best - logit) / max(abs(logit), best)
            # 0/0 is NaN, which compares false, so the logit is kept, as in the reference.
            if available[e] and not widen(narrow(gap, logits[e])) > limit:
                total += exp(logit - best)
        weights[choice], ids[choice] = float32(1.0) / total, chosen
        available[chosen] = False


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _softmax(logits: Any, available: Any, weights: Any, ids: Any, over_all: bool) -> None:
    for choice in range(len(weights)):
        ids[choice] = _best(logits, available)
        available[ids[choice]] = False
    best = widen(logits[ids[0]])
    total = float32(0.0)
    if over_all:
        for e in range(len(logits)):
            total += exp(widen(logits[e]) - best)
    for choice in range(len(weights)):
        weights[choice] = exp(widen(logits[ids[choice]]) - best)
        if not over_all:
            total += weights[choice]
    for choice in range(len(weights)):
        weights[choice] /= total


@inlined
def _best(logits: Any, available: Any) -> Any:
    best = -1
    for e in range(len(logits)):
        if available[e] and (best < 0 or widen(logits[e]) > widen(logits[best])):
            best = e
    return best


def sparsemixer_ref(router_logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Compute `sparsemixer` in torch, on any device."""
    logits = router_logits.float()
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    best, ids = ordered[:, :2].unsqueeze(-1), order[:, :2].contiguous()
    logits = logits.unsqueeze(1)
    gap = (best - logits) / torch.maximum(logits.abs(), best)
    # 0/0 is NaN, which compares false, so the logit is kept, as in the reference.
    dropped = gap.to(router_logits.dtype) > sparsemixer_threshold(jitter, router_logits.dtype)
    dropped[:, 1].scatter_(-1, ids[:, :1], True)
    weights = logits.masked_fill(dropped, -torch.inf).softmax(dim=-1)
    return weights.gather(-1, ids.unsqueeze(-1)).squeeze(-1), ids


def softmax_topk_ref(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `softmax_topk` in torch, on any device."""
    # A stable sort, not topk: topk breaks ties arbitrarily, and all logits of phixtral's published router are ties.
    best, ids = router_logits.float().sort(dim=-1, descending=True, stable=True)
    return best[:, :k].softmax(dim=-1), ids[:, :k].contiguous()


def softmax_all_ref(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `softmax_all` in torch, on any device."""
    logits = router_logits.float()
    ids = logits.sort(dim=-1, descending=True, stable=True)[1][:, :k].contiguous()
    return logits.softmax(dim=-1).gather(-1, ids), ids


def sigmoid_one_ref(router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `sigmoid_one` in torch, on any device."""
    return router_logits.float().sigmoid(), torch.zeros_like(router_logits, dtype=torch.int64)


def choose_ref(router_logits: Tensor, method: RoutingMethod, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose by any of the methods in torch, on any device. jitter: sparsemixer's"""
    match method:
        case "sparsemixer":
            return sparsemixer_ref(router_logits, jitter)
        case "softmax":
            return softmax_topk_ref(router_logits, top_k)
        case "softmax_all":
            return softmax_all_ref(router_logits, top_k)
        case "sigmoid":
            return sigmoid_one_ref(router_logits)
