"""Routing: router logits -> which experts a token goes to, and with what weights. Lowest expert index on ties."""

from functools import cache

import torch
from torch import Tensor


def sparsemixer(router_logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose two experts a token as Phi-MoE does at inference; the weights are not renormalised (mostly 1.0 and 1.0).

    For each of the two choices, logits further than 2*jitter (relative) below the choice drop out of the softmax that
    gives its weight; the second choice never sees the first. Rounded to the model's dtype before (router_logits come
    in it), computed in fp32. (modeling_phimoe.py, sparsemixer; SparseMixer-v2, arXiv 2409.12136)

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, 2] fp32, expert ids [num_tokens, 2] int64
    """
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


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The reference compares in the logits' dtype, in which 0.02 is 0.02001953125 (bf16)."""
    return torch.tensor(value, dtype=dtype).item()


def softmax_topk(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts a token, weighted by the softmax over those k (Mixtral's rule, arXiv 2401.04088).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, summing to 1; expert ids [num_tokens, k] int64, best first
    """
    # A stable sort, not topk: topk breaks ties as it likes, and phixtral's published router consists of ties.
    best, ids = router_logits.float().sort(dim=-1, descending=True, stable=True)
    return best[:, :k].softmax(dim=-1), ids[:, :k].contiguous()
