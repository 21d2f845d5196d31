"""SelfAttention: attention over the paged KV cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.layers.linear import GatheredLinear, Linear
from moray.engine.layers.qk_norm import QueryKeyNorm
from moray.engine.layers.rotary import Rotary
from moray.engine.partition import WHOLE, Partition


class SelfAttention(nn.Module):
    """Computes the fused qkv projection, rope, cache write, attention and output projection of a layer.

    Keys are cached after rotation, so a cached block belongs to one set of rope factors. A rank computes its heads; all
    are gathered before the output projection.

    sinks: [config.num_heads], a score of each head that has a weight in the softmax and no value; once they are
           processed, those of the rank's heads in fp32. None = there are none
    kv_scales: of a cache of e4m3, from the backend; None = the cache has the dtype of the model
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(
        self,
        config: ModelConfig,
        partition: Partition = WHOLE,
        *,
        bias: bool,
        output_bias: bool | None = None,
        qk_norm: Callable[[ModelConfig, Partition], QueryKeyNorm] | None = None,
        has_window: bool = True,
        has_sinks: bool = False,
    ) -> None:
        """Make the layer.

        bias:         q, k and v have biases
        output_bias:  the output projection has one; None = as q, k and v
        qk_norm:      what normalises q and k before rope; None = nothing
        has_window:   the config's sliding window, if it has one, is this layer's too
        has_sinks:    each head has a sink
        """
        super().__init__()
        self.num_heads, self.num_kv_heads = partition.num_heads(config), partition.num_kv_heads(config)
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.clip_qkv = config.clip_qkv
        self.sliding_window = config.sliding_window if has_window else None
        self.qk_norm = None if qk_norm is None else qk_norm(config, partition)
        rows = partition.split_qkv(config)
        self.qkv_proj = Linear(config.hidden_size, rows.total, bias=bias, rows=rows)
        self.o_proj = GatheredLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            partition,
            bias=bias if output_bias is None else output_bias,
        )
        (self._heads,) = partition.split(config.num_heads).held
        self.sinks = nn.Parameter(torch.empty(config.num_heads), requires_grad=False) if has_sinks else None
        self.kv_scales: Any = None
        self._kv_heads = partition.kv_heads(config)
        self._backend: Backend | None = None

    def take_kv_scales(self, scales: Tensor) -> None:
        """Keep the scales of a cache of e4m3. scales: [2, num_kv_heads] of this rank's keys and values, or of all"""
        assert self._backend is not None, "process_weights_after_loading() comes before the scales"
        of_rank = scales if scales.shape[1] == self.num_kv_heads else scales[:, self._kv_heads]
        self.kv_scales = self._backend.make_kv_scales(of_rank)

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Keep the backend, whose kernels attend, and the sinks of this rank."""
        self._backend = backend
        if self.sinks is not None:
            self.sinks = nn.Parameter(self.sinks[self._heads].float(), requires_grad=False)

    def forward(self, x: Tensor, rotary: Rotary, inputs: ModelInputs) -> Tensor:
        """Attend from the step's tokens. x and the result: [num_tokens, hidden_size]"""
        assert self._backend is not None, "process_weights_after_loading() comes before forward()"
        qkv = self.qkv_proj(x)
        if self.qk_norm is not None:
            self.qk_norm(qkv)
        if self.clip_qkv is not None:
            qkv.clamp_(-self.clip_qkv, self.clip_qkv)
        out = self._backend.attend(
            qkv,
            rotary,
            self.k_cache,
            self.v_cache,
            inputs.attention,
            num_heads=self.num_heads,
            scale=self.scale,
            sliding_window=self.sliding_window,
            sinks=self.sinks,
            kv_scales=self.kv_scales,
        )
        return self.o_proj(self._backend.communicator.gather(out.view(len(x), -1)))


def attention_layers(model: nn.Module) -> list[SelfAttention]:
    """Return the model's attention layers, first to last; each needs its own part of the KV cache."""
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def qkv_rows(config: ModelConfig) -> dict[str, slice]:
    """Return the rows of the fused qkv weight that hold q, k and v."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
