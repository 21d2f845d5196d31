"""Embedding: the token embedding layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Embedding(nn.Module):
    """Looks up the embeddings of token ids.

    weight: [vocab_size, hidden_size]
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [num_tokens, hidden_size] of input_ids, [num_tokens] int64."""
        return functional.embedding(input_ids, self.weight)
