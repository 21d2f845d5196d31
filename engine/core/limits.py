"""Choose how much runs at once: the size of the KV cache, and with it the limits of a step."""

from collections.abc import Iterator
from dataclasses import dataclass

from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.graph_shapes import MAX_LOGITS_SEQS, GraphShapes, choose_shapes
from moray.engine.core.step_limits import DEFAULTS, choose_step_limits
from moray.engine.core.step_memory import layers_bytes
from moray.engine.errors import CheckpointError, NodeError, Problem, RequestError
from moray.engine.partition import find_split_problems
from moray.kernels.workspace import ATTENTION_BYTES

BLOCK_SIZE = 16  # tokens per block of the KV cache
UNLIMITED = 1 << 62  # bytes


@dataclass(frozen=True)
class Limits:
    """Holds the limits of a running engine; see EngineConfig.

    num_blocks: blocks of the KV cache
    block_size: tokens per block
    """

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
    config: EngineConfig,
    model: ModelConfig,
    *,
    itemsize: int,
    available_bytes: int,
    device: str,
    largest_step: tuple[int, int] | None = None,
) -> Limits:
    """Choose the limits of a loaded model.

    itemsize:        bytes of one number in the KV cache
    available_bytes: memory that the model leaves on a machine; or with its largest step on a GPU, each rank's the same
    device:          "cpu" or "cuda"
    largest_step:    most sequences and tokens of that step, which the limits may not exceed; None = any

    Raises CheckpointError when the model does not allow the config, and NodeError when the free memory is too small
    for one block.
    """
    if problems := list(find_config_problems(config, model, itemsize)):
        raise CheckpointError("; ".join(map(str, problems)))
    max_model_len = config.max_model_len or model.max_position_embeddings
    ranks = config.tensor_parallel or 1
    block_bytes = cache_bytes(BLOCK_SIZE, model, itemsize, ranks)
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    if largest_step is None:
        largest_step = choose_largest_step(
            config, model, itemsize=itemsize, available_bytes=available_bytes, device=device
        )
    if device == "cuda":
        graphs = choose_graphs(
            config, model, *largest_step, itemsize=itemsize, available_bytes=available_bytes, device=device
        )
        available_bytes -= 0 if graphs is None else graphs.num_bytes
    memory = _cache_memory(config, available_bytes, device)
    limits = choose_step_limits(config, device, memory // cache_bytes_per_token(model, itemsize, ranks))
    max_num_seqs, max_num_batched_tokens = map(min, limits, largest_step)
    if config.kv_cache_memory is None:
        memory = min(memory, max_num_seqs * blocks_per_seq * block_bytes)
    num_blocks = memory // block_bytes
    if num_blocks < 1:
        raise NodeError(
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


def choose_largest_step(
    config: EngineConfig, model: ModelConfig, *, itemsize: int, available_bytes: int, device: str
) -> tuple[int, int]:
    """Return the most sequences and tokens of a step that choose_limits may choose, whatever the step itself needs.

    available_bytes: memory that the model leaves
    """
    memory = _cache_memory(config, available_bytes, device)
    token_bytes = cache_bytes_per_token(model, itemsize, config.tensor_parallel or 1)
    return choose_step_limits(config, device, memory // token_bytes)


def _cache_memory(config: EngineConfig, available_bytes: int, device: str) -> int:
    """Return the bytes that the KV cache may take, of all ranks together."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    ranks = (config.tensor_parallel or 1) if device == "cuda" else 1  # each has a GPU, and its share of a block
    return int(DEFAULTS[device].cache_share * available_bytes * ranks)


def choose_graphs(
    config: EngineConfig,
    model: ModelConfig,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    itemsize: int,
    available_bytes: int,
    device: str,
) -> GraphShapes | None:
    """Choose which steps run from graphs; None = none do. The arguments are as of choose_limits()."""
    if not config.cuda_graphs:
        return None
    if device == "cpu":
        available_bytes = UNLIMITED  # graphs take some MB there
    max_model_len = config.max_model_len or model.max_position_embeddings
    ranks = config.tensor_parallel or 1

    def pool_bytes(num_tokens: int) -> int:
        logits_bytes = min(num_tokens, max_num_seqs, MAX_LOGITS_SEQS) * model.vocab_size * itemsize
        # Logits are in memory as the head computes them, and where all graphs write them.
        return layers_bytes(model, itemsize, num_tokens, ranks) + 2 * logits_bytes + ATTENTION_BYTES

    max_blocks = -(-max_model_len // BLOCK_SIZE)
    mean_blocks = None if config.mean_cached_tokens is None else -(-config.mean_cached_tokens // BLOCK_SIZE)
    step = max_num_seqs, max_num_batched_tokens
    return choose_shapes(*step, max_blocks, available_bytes, pool_bytes, mean_blocks)


def find_config_problems(config: EngineConfig, model: ModelConfig, itemsize: int) -> Iterator[Problem]:
    """Yield a Problem, by the field names of the job spec, for each setting that no machine can run with this model.

    The check needs no loaded model.
    """
    longest, context = config.max_model_len, model.max_position_embeddings
    if longest is not None and longest > context:
        message = f"must be at most the model's context (max_position_embeddings), {context:,}, is {longest:,}"
        yield Problem("model.max_model_len", message)
    size = config.tensor_parallel or 1
    yield from find_split_problems(model, size, expert_parallel=config.expert_parallel)
    memory, block_bytes = config.kv_cache_memory, cache_bytes(BLOCK_SIZE, model, itemsize, size)
    if memory is not None and memory < block_bytes:
        message = f"must hold a block of {BLOCK_SIZE} tokens, {block_bytes:,} bytes, is {memory:,}"
        yield Problem("engine.kv_cache_memory", message)


def check_length(
    num_prompt_tokens: int, num_more: int, max_model_len: int, what: str = "max_tokens", key: str = "max_model_len"
) -> None:
    """Raise RequestError("too_long") where a prompt and what follows it are longer than the context.

    num_more:  tokens after the prompt
    what:      what they are, for the message: max_tokens, or a continuation that is scored
    key:       the setting that has max_model_len, for the message
    """
    needed = num_prompt_tokens + num_more
    if needed > max_model_len:
        raise RequestError(
            "too_long",
            f"needs {needed:,} tokens (prompt {num_prompt_tokens:,} + {what} {num_more:,}); this model holds "
            f"{max_model_len:,}. Shorten it or raise {key}.",
            field="max_tokens" if what == "max_tokens" and num_more >= max_model_len else None,
        )


def num_cached_tokens(num_prompt_tokens: int, max_tokens: int) -> int:
    """Return the maximum number of a sequence's tokens in the KV cache: its last token is sampled but never run."""
    return num_prompt_tokens + max(0, max_tokens - 1)


def cache_bytes(num_tokens: int, model: ModelConfig, itemsize: int, ranks: int = 1) -> int:
    """Return the bytes of the cache blocks, of all ranks, that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE * cache_bytes_per_token(model, itemsize, ranks)


def cache_bytes_per_token(model: ModelConfig, itemsize: int, ranks: int = 1) -> int:
    """Return the bytes of one token's keys and values in all layers and ranks, each of which has at least one head.

    itemsize: bytes of a number that is not quantized
    """
    itemsize = itemsize if model.kv_cache is None else 1
    return 2 * model.num_layers * max(model.num_kv_heads, ranks) * model.head_dim * itemsize
