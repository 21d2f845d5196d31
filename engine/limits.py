"""How much runs at once: the limits of a step and the size of the KV cache, where the user left them to us."""

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError

BLOCK_SIZE = 16
ATTENTION_BYTES = 2**28  # of splits of keys that share programs; kernels/gpu/paged_attention.py


@dataclass(frozen=True)
class Defaults:
    """cache_share: of the memory that is left beside the model and, on a GPU, its largest step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_bulk_tokens: int
    cache_share: float


# A GPU's memory is the engine's alone; what its steps need is measured, and graphs take some more. Below some 1,500
# tokens a step its time goes into reading experts.
DEFAULTS = {"cpu": Defaults(64, 512, 128, 0.5), "cuda": Defaults(256, 2048, 512, 0.95)}


@dataclass(frozen=True)
class Limits:
    """See EngineConfig. num_blocks: cache blocks of block_size tokens each."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_bulk_tokens: int
    num_blocks: int
    block_size: int

    def __str__(self) -> str:
        return (
            f"{self.max_num_seqs} sequences and {self.max_num_batched_tokens:,} tokens a step, "
            f"{self.num_blocks * self.block_size:,} tokens of KV cache, context {self.max_model_len:,}"
        )


def choose_limits(
    config: EngineConfig, model: ModelConfig, *, itemsize: int, available_bytes: int, device: str
) -> Limits:
    """Settle the limits for a loaded model on a device ("cpu", "cuda"); `itemsize` is the bytes of a cached number.

    Raises CheckpointError where max_model_len is beyond the model's context or the memory holds no block.
    """
    longest = model.max_position_embeddings
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise CheckpointError(
            f"model.max_model_len is {max_model_len:,}; the model's context (max_position_embeddings) is {longest:,}."
        )
    max_num_seqs, max_num_batched_tokens = choose_step_limits(config, device)
    block_bytes = BLOCK_SIZE * cache_bytes_per_token(model, itemsize)
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    memory = config.kv_cache_memory
    if memory is None:
        memory = min(int(DEFAULTS[device].cache_share * available_bytes), max_num_seqs * blocks_per_seq * block_bytes)
    num_blocks = memory // block_bytes
    if num_blocks == 0:
        raise CheckpointError(
            f"engine.kv_cache_memory is {memory:,} bytes; one block of {BLOCK_SIZE} tokens needs {block_bytes:,}."
        )
    return Limits(
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        config.max_num_bulk_tokens or DEFAULTS[device].max_num_bulk_tokens,
        num_blocks,
        BLOCK_SIZE,
    )


def choose_step_limits(config: EngineConfig, device: str) -> tuple[int, int]:
    """Most sequences and most tokens in a step."""
    defaults = DEFAULTS[device]
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    return max_num_seqs, config.max_num_batched_tokens or max(defaults.max_num_batched_tokens, max_num_seqs)


def cache_bytes_per_token(model: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
