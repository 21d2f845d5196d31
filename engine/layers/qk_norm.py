"""Norms of queries and keys before rope: HeadNorm of each head, RowNorm of all heads of a token together."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.config import ModelConfig
from moray.engine.partition import Partition


class QueryKeyNorm(nn.Module, ABC):
    """Normalises the queries and keys in the rows of a fused qkv projection with an RMSNorm.

    q_weight: [columns of what is normalised together in queries]
    k_weight: the same for keys
    """

    def __init__(self, config: ModelConfig, partition: Partition, q_size: int, k_size: int) -> None:
        """Make the layer. q_size, k_size: columns that are normalised together"""
        super().__init__()
        self.num_heads, self.num_kv_heads = partition.num_heads(config), partition.num_kv_heads(config)
        self.q_weight = nn.Parameter(torch.empty(q_size), requires_grad=False)
        self.k_weight = nn.Parameter(torch.empty(k_size), requires_grad=False)
        self.eps = config.norm_eps
        self._backend: Backend | None = None

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Keep the backend, whose kernel normalises."""
        self._backend = backend

    def _normalize(self, qkv: Tensor, num_q: int, num_k: int) -> None:
        assert self._backend is not None, "process_weights_after_loading() comes before forward()"
        self._backend.norm_queries_and_keys(qkv, self.q_weight, self.k_weight, num_q, num_k, self.eps)

    @abstractmethod
    def forward(self, qkv: Tensor) -> None:
        """Normalise q and k in place. qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], of this rank"""


class HeadNorm(QueryKeyNorm):
    """Normalises each head for itself; all heads have the same weight."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__(config, partition, config.head_dim, config.head_dim)

    def forward(self, qkv: Tensor) -> None:
        self._normalize(qkv, self.num_heads, self.num_kv_heads)


class RowNorm(QueryKeyNorm):
    """Normalises all heads of a token together. Ranks gather the heads for it: the sum over them is never split."""

    def __init__(self, config: ModelConfig, partition: Partition) -> None:
        super().__init__(config, partition, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)
        self.head_dim = config.head_dim
        self.ranks_of_a_kv_head = max(1, partition.size // config.num_kv_heads)
        self.first_kv_head = partition.rank * config.num_kv_heads // partition.size

    def forward(self, qkv: Tensor) -> None:
        assert self._backend is not None, "process_weights_after_loading() comes before forward()"
        communicator = self._backend.communicator
        rank, size = communicator.partition.rank, communicator.partition.size
        if size == 1:
            return self._normalize(qkv, 1, 1)
        q, k = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = communicator.gather(qkv[:, : q + k]).view(len(qkv), size, q + k)
        keys = parts[:, :: self.ranks_of_a_kv_head, q:].flatten(1)  # ranks may share a head of keys
        whole = torch.cat((parts[:, :, :q].flatten(1), keys), dim=1)
        self._normalize(whole, 1, 1)
        qkv[:, :q] = whole[:, rank * q : (rank + 1) * q]
        first = size * q + self.first_kv_head * self.head_dim
        qkv[:, q : q + k] = whole[:, first : first + k]
