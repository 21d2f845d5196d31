"""Estimates of the memory that a step takes on a GPU, beside weights and KV cache. Pure."""

from moray.engine.config import ModelConfig
from moray.kernels.workspace import ATTENTION_BYTES

PADDED_ROWS = 128  # rows by which each expert's last tile is padded, at most


def step_bytes(
    model: ModelConfig, itemsize: int, max_num_seqs: int, max_num_batched_tokens: int, ranks: int = 1
) -> int:
    """Estimate the memory of a GPU's largest step without weights and cache; ModelRunner measures it."""
    # Logits, the same in float32, their log-softmax, and the sort of that: values and 64-bit indices, twice.
    logits = max_num_seqs * model.vocab_size * (itemsize + 4 + 4 + 2 * (4 + 8))
    return ATTENTION_BYTES + max(layers_bytes(model, itemsize, max_num_batched_tokens, ranks), logits)


def layers_bytes(model: ModelConfig, itemsize: int, tokens: int, ranks: int = 1) -> int:
    """Estimate the memory that the layers take for a step's tokens, without the partial results of attention."""
    rows = tokens * model.num_experts_per_tok + model.num_experts * PADDED_ROWS
    experts = rows * (model.intermediate_size + model.hidden_size) * itemsize
    if ranks > 1:  # a gather has the rank's part, all parts, and these in order
        experts = max(experts, rows * (model.intermediate_size // ranks + 2 * model.intermediate_size) * itemsize)
    widest = max(model.dense_intermediate_size, model.shared_intermediate_size)
    if widest:  # an MLP of all tokens, whose output is kept while experts run
        experts += tokens * (widest + model.hidden_size) * itemsize
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return experts + tokens * (4 * model.hidden_size + 2 * heads) * itemsize
