"""Self-attention over the paged KV cache."""

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.inputs import ModelInputs, PagedBatch
from engine.layers.linear import Linear
from engine.layers.rotary import Rotary
from kernels.cpu.paged_attention import AttentionBatch, paged_attention
from kernels.cpu.rope_kv import rope_kv


class SelfAttention(nn.Module):
    """Fused qkv projection, rope, cache write, attention, output projection.

    K is cached after rotation, so a cached block belongs to one rope factor set.
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: ModelConfig, *, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sliding_window = config.sliding_window
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor, rotary: Rotary, inputs: ModelInputs) -> Tensor:
        """hidden_states: [num_tokens, hidden_size] -> the same shape"""
        qkv = self.qkv_proj(hidden_states)
        if isinstance(inputs.attention, PagedBatch):
            out = self._attend_paged(qkv, rotary, inputs.attention)
        else:
            out = self._attend(qkv, rotary, inputs.attention)
        return self.o_proj(out.view(len(hidden_states), -1))

    def _attend(self, qkv: Tensor, rotary: Rotary, batch: AttentionBatch) -> Tensor:
        q = rope_kv(qkv, *rotary, self.k_cache, self.v_cache, batch.slots, self.num_heads)
        return paged_attention(q, self.k_cache, self.v_cache, batch, self.head_dim**-0.5, self.sliding_window)

    def _attend_paged(self, qkv: Tensor, rotary: Rotary, batch: PagedBatch) -> Tensor:
        from kernels.gpu import paged_attention as gpu
        from kernels.gpu import rope_kv as gpu_rope

        q = gpu_rope.rope_kv(qkv, *rotary, self.k_cache, self.v_cache, batch.slots, self.num_heads)
        tables = batch.block_tables, batch.query_starts, batch.context_lens
        return gpu.paged_attention(q, self.k_cache, self.v_cache, *tables, self.head_dim**-0.5, self.sliding_window)


def attention_layers(model: nn.Module) -> list[SelfAttention]:
    """The model's attention layers, first to last: each wants a slice of the KV cache."""
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def qkv_rows(config: ModelConfig) -> dict[str, slice]:
    """Rows of the fused qkv weight that hold q, k and v."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
