"""What of a model fits into the memory of a card, or of this machine, as the engine will share it out. Pure."""

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError
from engine.limits import ATTENTION_BYTES, Limits, cache_bytes_per_token, choose_limits, choose_step_limits

GIB = 1 << 30
DRIVER_BYTES = GIB  # about what the driver and CUDA's context keep of a card for themselves
PADDED_ROWS = 128  # of each expert's tile, at most


@dataclass(frozen=True)
class MemoryFit:
    """
    name:           of the card, or "this machine"
    memory_bytes:   a worker's: its share of the card, or what is free on this machine
    working_bytes:  a GPU's largest step and what the driver keeps, estimated; the engine measures it when it starts
    limits:         of the engine there; None where not even one block of KV cache is left
    cache_bytes:    that the KV cache takes
    """

    name: str
    memory_bytes: int
    weights_bytes: int
    working_bytes: int
    cache_bytes: int
    max_model_len: int
    limits: Limits | None

    @property
    def cache_tokens(self) -> int:
        return 0 if self.limits is None else self.limits.num_blocks * self.limits.block_size

    @property
    def fits(self) -> bool:
        """Weights and one sequence of the longest length."""
        return self.cache_tokens >= self.max_model_len

    def sequences(self, length: int) -> int:
        """Sequences of so many tokens that run at once."""
        if self.limits is None:
            return 0
        blocks = max(1, -(-length // self.limits.block_size))
        return min(self.limits.max_num_seqs, self.limits.num_blocks // blocks)

    def explain(self) -> str:
        """Why it does not fit, and what to do."""
        needed = f"{self.weights_bytes / GIB:.1f} GiB of weights"
        if self.working_bytes:
            needed += f" and about {self.working_bytes / GIB:.1f} GiB to work in"
        left = self.memory_bytes - self.weights_bytes - self.working_bytes
        whole = f"{self.memory_bytes / GIB:.1f} GiB"
        if left <= 0:
            return f"{needed} do not fit into {whole}; take a larger card"
        if self.limits is None:
            return f"{needed} leave {left / GIB:.1f} of {whole}, too little for engine.kv_cache_memory; lower that"
        room = f"room for {self.cache_tokens:,} tokens of KV cache in {whole}"
        fix = "lower model.max_model_len or take a larger card"
        return f"{needed} leave {room}, and a sequence may have {self.max_model_len:,}; {fix}"


def fit_memory(
    name: str, config: EngineConfig, model: ModelConfig, *, weights_bytes: int, itemsize: int, memory_bytes: int
) -> MemoryFit:
    """How the engine will share out `memory_bytes` of a GPU, or of this machine where config.device is "cpu".

    itemsize: bytes of a number in the weights and the cache
    """
    device = "cpu" if config.device == "cpu" else "cuda"
    working = 0 if device == "cpu" else DRIVER_BYTES + step_bytes(model, itemsize, *choose_step_limits(config, device))
    available = memory_bytes - weights_bytes - working
    token_bytes = cache_bytes_per_token(model, itemsize)
    limits: Limits | None = None
    if available > 0:
        try:
            limits = choose_limits(config, model, itemsize=itemsize, available_bytes=available, device=device)
        except CheckpointError:  # not a block
            limits = None
    if limits is not None and limits.num_blocks * limits.block_size * token_bytes > available:
        limits = None  # engine.kv_cache_memory asks for more than there is
    cache = 0 if limits is None else limits.num_blocks * limits.block_size * token_bytes
    longest = config.max_model_len or model.max_position_embeddings
    return MemoryFit(name, memory_bytes, weights_bytes, working, cache, longest, limits)


def step_bytes(model: ModelConfig, itemsize: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """About what a GPU's largest step takes beside weights and cache: what ModelRunner.measure_peak measures there."""
    tokens = max_num_batched_tokens
    rows = tokens * model.num_experts_per_tok + model.num_experts * PADDED_ROWS
    experts = rows * (model.intermediate_size + model.hidden_size) * itemsize
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    others = tokens * (4 * model.hidden_size + 2 * heads) * itemsize
    # Logits, in float, their log-softmax, and the sort of these: values and 64-bit places, twice.
    logits = max_num_seqs * model.vocab_size * (itemsize + 4 + 4 + 2 * (4 + 8))
    return ATTENTION_BYTES + max(experts + others, logits)
