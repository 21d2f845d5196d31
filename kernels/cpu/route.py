"""Routing: choose each token's experts and their weights from the router logits. Ties go to the lowest expert index."""

from typing import Any

import numpy as np
import torch
from numba import float32
from torch import Tensor

from moray.kernels.cpu.numba_intrinsics import array, compiled, exp, inlined, narrow, widen
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
    weights, ids = _new(len(router_logits), 2)
    limit = np.float32(sparsemixer_threshold(jitter, router_logits.dtype))
    _sparsemixer(array(router_logits), limit, array(weights), array(ids))
    return weights, ids


def softmax_topk(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts per token, weighted by the softmax over those k (Mixtral's rule, arXiv 2401.04088).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, summing to 1; expert ids [num_tokens, k] int64, best first
    """
    weights, ids = _new(len(router_logits), k)
    _softmax_topk(array(router_logits), array(weights), array(ids))
    return weights, ids


def softmax_all(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts per token, weighted by the softmax over all experts (OLMoE's rule, arXiv 2409.02060).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, whose sum is below 1; expert ids [num_tokens, k] int64, best first
    """
    weights, ids = _new(len(router_logits), k)
    _softmax_all(array(router_logits), array(weights), array(ids))
    return weights, ids


def sigmoid_one(router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the only expert of each token, weighted by the sigmoid of its logit.

    router_logits: [num_tokens, 1]
    returns:       weights [num_tokens, 1] fp32; expert ids [num_tokens, 1] int64, all 0
    """
    weights, ids = _new(len(router_logits), 1)
    _sigmoid_one(array(router_logits), array(weights), array(ids))
    return weights, ids


def _new(num_tokens: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(num_tokens, k), torch.empty(num_tokens, k, dtype=torch.int64)


@compiled
def _sparsemixer(logits: Any, limit: Any, weights: Any, ids: Any) -> None:
    num_tokens, num_experts = logits.shape
    available = np.empty(num_experts, np.bool_)  # experts that have not been chosen
    for t in range(num_tokens):
        available[:] = True
        for choice in range(2):
            chosen = _best(logits[t], available)
            best = widen(logits[t, chosen])
            total = float32(0.0)
            for e in range(num_experts):
                logit = widen(logits[t, e])
                gap = (best - logit) / max(abs(logit), best)
                # 0/0 is NaN, which compares false, so the logit is kept, as in the reference.
                if available[e] and not widen(narrow(gap, logits[t, e])) > limit:
                    total += exp(logit - best)
            weights[t, choice], ids[t, choice] = float32(1.0) / total, chosen
            available[chosen] = False


@compiled
def _softmax_topk(logits: Any, weights: Any, ids: Any) -> None:
    num_tokens, num_experts = logits.shape
    available = np.empty(num_experts, np.bool_)
    for t in range(num_tokens):
        available[:] = True
        total = float32(0.0)
        for choice in range(weights.shape[1]):
            chosen = _best(logits[t], available)
            available[chosen] = False
            ids[t, choice] = chosen
            weights[t, choice] = exp(widen(logits[t, chosen]) - widen(logits[t, ids[t, 0]]))
            total += weights[t, choice]
        for choice in range(weights.shape[1]):
            weights[t, choice] /= total


@compiled
def _softmax_all(logits: Any, weights: Any, ids: Any) -> None:
    num_tokens, num_experts = logits.shape
    available = np.empty(num_experts, np.bool_)
    for t in range(num_tokens):
        available[:] = True
        for choice in range(weights.shape[1]):
            chosen = _best(logits[t], available)
            available[chosen] = False
            ids[t, choice] = chosen
        best = widen(logits[t, ids[t, 0]])
        total = float32(0.0)
        for e in range(num_experts):
            total += exp(widen(logits[t, e]) - best)
        for choice in range(weights.shape[1]):
            weights[t, choice] = exp(widen(logits[t, ids[t, choice]]) - best) / total


@compiled
def _sigmoid_one(logits: Any, weights: Any, ids: Any) -> None:
    for t in range(len(logits)):
        logit = widen(logits[t, 0])
        e = exp(-abs(logit))
        weights[t, 0] = (float32(1.0) if logit >= float32(0.0) else e) / (float32(1.0) + e)
        ids[t, 0] = 0


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
