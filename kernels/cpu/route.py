"""Routing: router logits -> which experts a token goes to, and with what weights. Lowest expert index on ties."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import float32
from torch import Tensor

from kernels.cpu.compiled import array, compiled, exp, inlined, narrow, widen


def sparsemixer(router_logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose two experts a token as Phi-MoE does at inference; the weights are not renormalised (mostly 1.0 and 1.0).

    For each of the two choices, logits further than 2*jitter (relative) below the choice drop out of the softmax that
    gives its weight; the second choice never sees the first. Rounded to the model's dtype before (router_logits come
    in it), computed in fp32. (modeling_phimoe.py, sparsemixer; SparseMixer-v2, arXiv 2409.12136)

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, 2] fp32, expert ids [num_tokens, 2] int64
    """
    weights, ids = _new(len(router_logits), 2)
    limit = np.float32(_rounded(2 * jitter, router_logits.dtype))
    _sparsemixer(array(router_logits), limit, array(weights), array(ids))
    return weights, ids


def softmax_topk(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts a token, weighted by the softmax over those k (Mixtral's rule, arXiv 2401.04088).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, summing to 1; expert ids [num_tokens, k] int64, best first
    """
    weights, ids = _new(len(router_logits), k)
    _softmax_topk(array(router_logits), array(weights), array(ids))
    return weights, ids


def _new(num_tokens: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(num_tokens, k), torch.empty(num_tokens, k, dtype=torch.int64)


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The reference compares in the logits' dtype, in which 0.02 is 0.02001953125 (bf16)."""
    return torch.tensor(value, dtype=dtype).item()


@compiled
def _sparsemixer(logits: Any, limit: Any, weights: Any, ids: Any) -> None:
    num_tokens, num_experts = logits.shape
    left = np.empty(num_experts, np.bool_)  # to choose among
    for t in range(num_tokens):
        left[:] = True
        for choice in range(2):
            chosen = _best(logits[t], left)
            best = widen(logits[t, chosen])
            total = float32(0.0)
            for e in range(num_experts):
                logit = widen(logits[t, e])
                gap = (best - logit) / max(abs(logit), best)
                # 0/0 is NaN, compares false and so stays in, as in the reference.
                if left[e] and not widen(narrow(gap, logits[t, e])) > limit:
                    total += exp(logit - best)
            weights[t, choice], ids[t, choice] = float32(1.0) / total, chosen
            left[chosen] = False


@compiled
def _softmax_topk(logits: Any, weights: Any, ids: Any) -> None:
    num_tokens, num_experts = logits.shape
    left = np.empty(num_experts, np.bool_)
    for t in range(num_tokens):
        left[:] = True
        total = float32(0.0)
        for choice in range(weights.shape[1]):
            chosen = _best(logits[t], left)
            left[chosen] = False
            ids[t, choice] = chosen
            weights[t, choice] = exp(widen(logits[t, chosen]) - widen(logits[t, ids[t, 0]]))
            total += weights[t, choice]
        for choice in range(weights.shape[1]):
            weights[t, choice] /= total


@inlined
def _best(logits: Any, left: Any) -> Any:
    best = -1
    for e in range(len(logits)):
        if left[e] and (best < 0 or widen(logits[e]) > widen(logits[best])):
            best = e
    return best


def sparsemixer_ref(router_logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """`sparsemixer` in torch, on any device."""
    logits = router_logits.float()
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    best, ids = ordered[:, :2].unsqueeze(-1), order[:, :2].contiguous()
    logits = logits.unsqueeze(1)
    gap = (best - logits) / torch.maximum(logits.abs(), best)
    # 0/0 is NaN, compares false and so stays in, as in the reference.
    dropped = gap.to(router_logits.dtype) > _rounded(2 * jitter, router_logits.dtype)
    dropped[:, 1].scatter_(-1, ids[:, :1], True)
    weights = logits.masked_fill(dropped, -torch.inf).softmax(dim=-1)
    return weights.gather(-1, ids.unsqueeze(-1)).squeeze(-1), ids


def softmax_topk_ref(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`softmax_topk` in torch, on any device."""
    # A stable sort, not topk: topk breaks ties as it likes, and phixtral's published router consists of ties.
    best, ids = router_logits.float().sort(dim=-1, descending=True, stable=True)
    return best[:, :k].softmax(dim=-1), ids[:, :k].contiguous()
