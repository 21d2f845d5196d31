"""How much runs at once: the limits of a step and the size of the KV cache, where the user left them to us."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError, Problem

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

    Raises CheckpointError where the model allows no such config or the memory holds no block.
    """
    if problems := list(find_config_problems(config, model, itemsize)):
        raise CheckpointError("; ".join(map(str, problems)))
    max_model_len = config.max_model_len or model.max_position_embeddings
    max_num_seqs, max_num_batched_tokens = choose_step_limits(config, device)
    block_bytes = cache_bytes(BLOCK_SIZE, model, itemsize)
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    memory = config.kv_cache_memory
    if memory is None:
        memory = min(int(DEFAULTS[device].cache_share * available_bytes), max_num_seqs * blocks_per_seq * block_bytes)
    num_blocks = memory // block_bytes
    if num_blocks < 1:
        raise CheckpointError(
            f"the KV cache may take {max(0, memory):,} bytes; one block of {BLOCK_SIZE} tokens needs {block_bytes:,}. "
            "Free some memory."
        )
    return Limits(
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        config.max_num_bulk_tokens or DEFAULTS[device].max_num_bulk_tokens,
        num_blocks,
        BLOCK_SIZE,
    )


def find_config_problems(config: EngineConfig, model: ModelConfig, itemsize: int) -> Iterator[Problem]:
    """What no machine can run, by the names of the job spec; it is known before the model is loaded."""
    longest, context = config.max_model_len, model.max_position_embeddings
    if longest is not None and longest > context:
        message = f"must be at most the model's context (max_position_embeddings), {context:,}, is {longest:,}"
        yield Problem("model.max_model_len", message)
    memory, block_bytes = config.kv_cache_memory, cache_bytes(BLOCK_SIZE, model, itemsize)
    if memory is not None and memory < block_bytes:
        message = f"must hold a block of {BLOCK_SIZE} tokens, {block_bytes:,} bytes, is {memory:,}"
        yield Problem("engine.kv_cache_memory", message)


def num_cached_tokens(num_prompt_tokens: int, max_tokens: int) -> int:
    """Most tokens of a sequence that stand in the KV cache: the last one is not run again."""
    return num_prompt_tokens + max(0, max_tokens - 1)


def choose_step_limits(config: EngineConfig, device: str) -> tuple[int, int]:
    """Most sequences and most tokens in a step."""
    defaults = DEFAULTS[device]
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    return max_num_seqs, config.max_num_batched_tokens or max(defaults.max_num_batched_tokens, max_num_seqs)


def cache_bytes(num_tokens: int, model: ModelConfig, itemsize: int) -> int:
    """Of the blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE * cache_bytes_per_token(model, itemsize)


def cache_bytes_per_token(model: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
