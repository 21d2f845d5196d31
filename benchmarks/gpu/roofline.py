"""What the card's memory and its matrix units allow: lower bounds on time, from shapes alone.

Work is counted as few bytes and operations as any implementation could do with: each weight that is used is read once,
each input once, each output written once. The bound is the larger of the two times. A step's bound is the sum over its
operations, since one operation's result is the next one's input.
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
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


H200 = Ceilings(4.3e12, 790e12)  # measured on one such card with torch's copy and matmul; where nothing else was


@dataclass(frozen=True)
class Weights:
    """How the weights of attention and experts are stored; all others have 16 bits.

    bits:   of a weight, its share of the scales included
    speed:  of multiplying them, in units of the rate of 16 bits
    """

    name: str
    bits: float
    speed: float = 1.0

    @property
    def item(self) -> float:
        """Bytes of a weight."""
        return self.bits / 8


DENSE = Weights("bf16", 16)


@dataclass(frozen=True)
class Work:
    num_bytes: float
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


def linear(rows: int, n: int, k: int, weights: Weights = DENSE) -> Work:
    """[rows, k] times a weight [n, k]."""
    return Work(weights.item * n * k + ITEM * rows * (n + k), 2.0 * rows * n * k / weights.speed)


def experts_hit(num_experts: int, top_k: int, tokens: int) -> float:
    """Expected number of experts that `tokens` use, if all experts are equally likely."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def grouped(hit: float, rows: int, n: int, k: int, weights: Weights = DENSE) -> Work:
    """`rows` rows, each times one of `hit` weights [n, k]; activations left out, as in `expert_layer`."""
    return Work(weights.item * hit * n * k, 2.0 * rows * n * k / weights.speed)


def expert_layer(config: ModelConfig, tokens: int, hit: float, weights: Weights = DENSE) -> list[Work]:
    """Both GEMMs of the experts, up and down. Of their activations nothing is counted: they fit the L2 cache."""
    i, h, rows = config.intermediate_size, config.hidden_size, tokens * config.num_experts_per_tok
    up = i * (2 if is_gated(config) else 1)
    return [grouped(hit, rows, up, h, weights), grouped(hit, rows, h, i, weights)]


def is_gated(config: ModelConfig) -> bool:
    return config.architecture != "phi-msft"


def attention(config: ModelConfig, keys_read: float, pairs: float) -> Work:
    """keys_read: keys of all sequences of a step; pairs: of a query and a key that it sees. One layer."""
    num_bytes = 2 * ITEM * keys_read * config.num_kv_heads * config.head_dim
    return Work(num_bytes, 4.0 * pairs * config.num_heads * config.head_dim)


@dataclass(frozen=True)
class Step:
    """decode_rows: sequences that decode; prefill_rows: prompt tokens, of prompts of prompt_tokens each; context: mean
    number of keys of a decoding sequence; hit: experts used in a layer; None: expected for equally likely experts"""

    decode_rows: int
    context: float
    prefill_rows: int = 0
    prompt_tokens: int = 0
    hit: float | None = None


def step(config: ModelConfig, of: Step, weights: Weights = DENSE) -> list[Work]:
    """Return the operations of one step of a whole model."""
    tokens = of.decode_rows + of.prefill_rows
    hit = of.hit
    if hit is None:
        hit = experts_hit(config.num_experts, config.num_experts_per_tok, tokens)
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    prompts = of.prefill_rows / of.prompt_tokens if of.prompt_tokens else 0.0
    keys = of.decode_rows * of.context + of.prefill_rows
    pairs = of.decode_rows * of.context + prompts * of.prompt_tokens**2 / 2
    layer = [
        linear(tokens, heads, config.hidden_size, weights),
        attention(config, keys, pairs),
        linear(tokens, config.hidden_size, config.num_heads * config.head_dim, weights),
        *expert_layer(config, tokens, hit, weights),
    ]
    sampled = of.decode_rows + round(prompts)
    return layer * config.num_layers + [linear(sampled, config.vocab_size, config.hidden_size)]


def weight_bytes(config: ModelConfig, weights: Weights = DENSE) -> float:
    """Return the bytes of a model's matrices in memory."""
    h, heads = config.hidden_size, config.num_heads * config.head_dim
    attention_weights = h * (heads + 2 * config.num_kv_heads * config.head_dim) + heads * h
    experts = config.num_experts * h * config.intermediate_size * (3 if is_gated(config) else 2)
    layer = weights.item * (attention_weights + experts) + ITEM * config.num_experts * h
    return config.num_layers * layer + 2 * ITEM * config.vocab_size * h


def seconds(ceilings: Ceilings, works: Iterable[Work]) -> float:
    return sum(ceilings.seconds(work) for work in works)
