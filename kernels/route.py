"""Routing: router logits -> which experts a token goes to, and with what weights. Lowest expert index on ties."""

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
    # The reference compares with 2*jitter rounded to the logits' dtype (0.02 is 0.02001953125 in bf16).
    threshold = torch.tensor(2 * jitter, dtype=router_logits.dtype).item()
    logits = router_logits.float()
    rest = logits
    weights, ids = [], []
    for _ in range(2):
        best, chosen = rest.max(dim=-1, keepdim=True)
        gap = (best - logits) / torch.maximum(logits.abs(), best)
        # 0/0 is NaN, compares false and so stays in, as in the reference.
        kept = rest.masked_fill(gap.to(router_logits.dtype).float() > threshold, -torch.inf)
        weights.append(kept.softmax(dim=-1).gather(-1, chosen))
        ids.append(chosen)
        rest = rest.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(ids, dim=-1)


def softmax_topk(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose the k best experts a token, weighted by the softmax over those k (Mixtral's rule, arXiv 2401.04088).

    router_logits: [num_tokens, num_experts]
    returns:       weights [num_tokens, k] fp32, summing to 1; expert ids [num_tokens, k] int64, best first
    """
    # A stable sort, not topk: topk breaks ties as it likes, and phixtral's published router consists of ties.
    best, ids = router_logits.float().sort(dim=-1, descending=True, stable=True)
    return best[:, :k].softmax(dim=-1), ids[:, :k].contiguous()
