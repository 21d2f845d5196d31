"""Embedding: the token embedding layer, and TiedHead, which computes logits with its weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moray.engine.backends.base import Backend
from moray.engine.layers.linear import GatheredLinear
from moray.engine.partition import Partition


class Embedding(nn.Module):
    """Looks up the embeddings of token ids.

    weight: [vocab_size, hidden_size]
    """

    def __init__(self, vocab_size: int, hidden_size: int, multiplier: float = 1.0) -> None:
        """Make the layer. multiplier: of the embeddings"""
        super().__init__()
        self.multiplier = multiplier
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [num_tokens, hidden_size] of input_ids, [num_tokens] int64."""
        embeddings = functional.embedding(input_ids, self.weight)
        return embeddings if self.multiplier == 1.0 else embeddings * self.multiplier


class TiedHead(GatheredLinear):
    """Computes logits with the weight of the embeddings, which is loaded once.

    A device that packs weights has it in memory twice then: the embeddings need it as it is.
    """

    def __init__(self, embedding: Embedding, partition: Partition) -> None:
        vocab_size, hidden_size = embedding.weight.shape
        super().__init__(hidden_size, vocab_size, partition, bias=False)
        self.weight = None
        self.embedding = embedding

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Pack the rows of the embeddings that this rank computes the logits of."""
        (rows,) = self._rows.held
        self.weight = nn.Parameter(self.embedding.weight[rows], requires_grad=False)
        super().process_weights_after_loading(backend)
