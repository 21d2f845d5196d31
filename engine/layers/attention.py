"""SelfAttention: attention over the paged KV cache."""

from collections.abc import Callable

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
    ) -> None:
        """Make the layer.

        bias:         q, k and v have biases
        output_bias:  the output projection has one; None = as q, k and v
        qk_norm:      what normalises q and k before rope; None = nothing
        """
        super().__init__()
        self.num_heads, self.num_kv_heads = partition.num_heads(config), partition.num_kv_heads(config)
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.clip_qkv, self.sliding_window = config.clip_qkv, config.sliding_window
        self.qk_norm = None if qk_norm is None else qk_norm(config, partition)
        rows = partition.split_qkv(config)
        self.qkv_proj = Linear(config.hidden_size, rows.total, bias=bias, rows=rows)
        self.o_proj = GatheredLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            partition,
            bias=bias if output_bias is None else output_bias,
        )
        self._backend: Backend | None = None

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Keep the backend, whose kernels attend."""
        self._backend = backend

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
        )
        return self.o_proj(self._backend.communicator.gather(out.view(len(x), -1)))


def attention_layers(model: nn.Module) -> list[SelfAttention]:
    """Return the model's attention layers, first to last; each needs its own part of the KV cache."""
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def qkv_rows(config: ModelConfig) -> dict[str, slice]:
    """Return the rows of the fused qkv weight that hold q, k and v."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
