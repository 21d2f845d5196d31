"""Compute lower bounds on time from shapes, by the rates of the GPU's memory and of its matrix units.

The work is the fewest bytes and operations that any implementation needs: each weight that is used is read once, each
input is read once, each output is written once. The bound is the larger of the two times. A step's bound is the sum
over its operations, since one operation's result is the next one's input.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moray.engine.config import ModelConfig

ITEM = 2  # bytes of an activation or cached number, and of a weight that is not quantized: bf16 or fp16


@dataclass(frozen=True)
class Ceilings:
    """Holds what was measured on the GPU itself: copying (bytes read and written) and a large product in 16 bits."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, work: "Work") -> float:
        """Return the time that the work takes at least."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


H200 = Ceilings(4.3e12, 790e12)  # measured on an H200 with torch's copy and matmul


@dataclass(frozen=True)
class Weights:
    """Describes how the weights of attention and experts are stored; all others have 16 bits.

    bits:   bits of a weight, with its share of the scales
    speed:  rate of multiplying them, as a multiple of the rate in 16 bits
    """

    name: str
    bits: float
    speed: float = 1.0

    @property
    def item(self) -> float:
        """Return the bytes of a weight."""
        return self.bits / 8


DENSE = Weights("bf16", 16)


@dataclass(frozen=True)
class Work:
    """Holds the bytes to read and write, and the operations to compute."""

    num_bytes: float
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


def linear(rows: int, n: int, k: int, weights: Weights = DENSE) -> Work:
    """Return the work of multiplying [rows, k] by a weight [n, k]."""
    return Work(weights.item * n * k + ITEM * rows * (n + k), 2.0 * rows * n * k / weights.speed)


def experts_hit(num_experts: int, top_k: int, tokens: int) -> float:
    """Return the expected number of experts that `tokens` tokens use, if all experts are equally likely."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def grouped(hit: float, rows: int, n: int, k: int, weights: Weights = DENSE) -> Work:
    """Return the work of multiplying `rows` rows, each by one of `hit` weights [n, k]; see expert_layer."""
    return Work(weights.item * hit * n * k, 2.0 * rows * n * k / weights.speed)


def expert_layer(config: ModelConfig, tokens: int, hit: float, weights: Weights = DENSE) -> list[Work]:
    """Return the work of both GEMMs of the experts. Activations are not counted: they fit the L2 cache."""
    i, h, rows = config.intermediate_size, config.hidden_size, tokens * config.num_experts_per_tok
    up = i * (2 if is_gated(config) else 1)
    return [grouped(hit, rows, up, h, weights), grouped(hit, rows, h, i, weights)]


def is_gated(config: ModelConfig) -> bool:
    """Return whether experts have a gate, and so three matrices."""
    return config.architecture != "phi-msft"


def attention(config: ModelConfig, keys_read: float, pairs: float, cache_item: float = ITEM) -> Work:
    """Return the work of attention in one layer.

    keys_read:   keys of all sequences of a step
    pairs:       pairs of a query and a key that it attends to
    cache_item:  bytes of a number in the KV cache
    """
    num_bytes = 2 * cache_item * keys_read * config.num_kv_heads * config.head_dim
    return Work(num_bytes, 4.0 * pairs * config.num_heads * config.head_dim)


@dataclass(frozen=True)
class Step:
    """Describes a step.

    decode_rows:    sequences that decode
    context:        mean number of keys of a decoding sequence
    prefill_rows:   prompt tokens
    prompt_tokens:  tokens of a whole prompt
    hit:            experts that a layer uses; None = the expected number if all are equally likely
    """

    decode_rows: int
    context: float
    prefill_rows: int = 0
    prompt_tokens: int = 0
    hit: float | None = None


def step(config: ModelConfig, of: Step, weights: Weights = DENSE, cache_item: float = ITEM) -> list[Work]:
    """Return the operations of one step of a whole model; cache_item: bytes of a number in the KV cache"""
    tokens = of.decode_rows + of.prefill_rows
    hit = of.hit
    if hit is None:
        hit = experts_hit(config.num_experts, config.num_experts_per_tok, tokens)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = [
        linear(tokens, heads, config.hidden_size, weights),
        linear(tokens, config.hidden_size, config.num_heads * config.head_dim, weights),
        *expert_layer(config, tokens, hit, weights),
    ]
    prompts = of.prefill_rows / of.prompt_tokens if of.prompt_tokens else 0.0
    works = layer * config.num_layers
    for number in range(config.num_layers):
        window = config.sliding_window
        if window is None or number in config.full_layers:
            window = 1 << 40
        decoded = of.decode_rows * min(of.context, window)
        pairs = decoded + prompts * of.prompt_tokens * min(of.prompt_tokens / 2, window)
        works.append(attention(config, decoded + of.prefill_rows, pairs, cache_item))
    sampled = of.decode_rows + round(prompts)
    return [*works, linear(sampled, config.vocab_size, config.hidden_size)]


def weight_bytes(config: ModelConfig, weights: Weights = DENSE) -> float:
    """Return the bytes of all matrices of a model."""
    h, heads = config.hidden_size, config.num_heads * config.head_dim
    attention_weights = h * (heads + 2 * config.num_kv_heads * config.head_dim) + heads * h
    experts = config.num_experts * h * config.intermediate_size * (3 if is_gated(config) else 2)
    layer = weights.item * (attention_weights + experts) + ITEM * config.num_experts * h
    return config.num_layers * layer + 2 * ITEM * config.vocab_size * h


def seconds(ceilings: Ceilings, works: Iterable[Work]) -> float:
    """Return the time that operations take at least, one after the other."""
    return sum(ceilings.seconds(work) for work in works)
