"""transformers with an attention whose memory grows with the length and not with its square, for long sequences."""

from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import Reference
from torch import Tensor
from transformers import AttentionInterface

ROWS_AT_ONCE = 64  # queries whose scores are in memory at once


def attend_by_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attend from a few queries at a time, each to itself and to all keys before it.

    The results of the last layer before config.first_needed are left at 0, because nothing depends on them.

    query:       [1, num_heads, length, head_dim]
    key, value:  [1, num_kv_heads, length, head_dim]

    Returns [1, length, num_heads, head_dim].
    """
    assert attention_mask is None, "the mask would be quadratic"
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    out = torch.zeros_like(query)
    is_last = module.layer_idx == module.config.num_hidden_layers - 1
    for start in range(module.config.first_needed if is_last else 0, query.shape[2], ROWS_AT_ONCE):
        rows = query[:, :, start : start + ROWS_AT_ONCE]
        end = start + rows.shape[2]
        scores = rows @ key[:, :, :end].transpose(2, 3) * scaling
        later = torch.arange(end - start) > torch.arange(end - start)[:, None]
        scores[..., start:].masked_fill_(later, float("-inf"))
        out[:, :, start:end] = scores.softmax(-1) @ value[:, :, :end]
    return out.transpose(1, 2), None


AttentionInterface.register("by rows", attend_by_rows)


class LongReference(Reference):
    """A Reference for sequences of any length, without a sliding window."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model.config._attn_implementation = "by rows"  # of which transformers makes no mask

    @torch.no_grad()
    def logits_from(self, token_ids: list[int], first: int) -> Tensor:
        """Return the logits after the tokens from `first` on: [len(token_ids) - first, vocab_size] fp32."""
        self.model.config.first_needed = first
        num_kept = len(token_ids) - first
        out: Tensor = self.model(input_ids=torch.tensor([token_ids]), use_cache=False, logits_to_keep=num_kept).logits[
            0
        ]
        return out.float()
