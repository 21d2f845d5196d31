"""Choose the limits of a step where the user set none. Pure.

The more sequences a step has, the more tokens are generated for each read of the weights, so a step gets as many
sequences as the KV cache is likely to hold.
"""

from dataclasses import dataclass

from moray.engine.config import EngineConfig

# Tokens of a sequence where nobody knows better. On average a sequence that runs has generated half of its answer.
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 256
# Tokens of a step for each of its sequences: its newest one, and prompts in the relation in which they are needed. With
# prompts twice as long as answers, two prompt tokens for each generated one keep the number of sequences.
TOKENS_PER_SEQ = 4
SEQS_STEP = 64  # more sequences than this are a multiple of it, as the sizes of CUDA graphs are


@dataclass(frozen=True)
class DeviceDefaults:
    """Holds what the limits of a device are chosen from when the user sets none; see EngineConfig.

    min_num_seqs, max_num_seqs:  the sequences of a step: at least, and at most where the KV cache holds so many
    max_num_batched_tokens:      tokens of a step; more with many sequences
    max_num_bulk_tokens:         of them, prompt tokens of requests below the highest priority
    cache_share:  share, for the KV cache, of the memory that the model and, on a GPU, its largest step and graphs leave
    empty_share:  share of the seats that may be empty while prompts gather, see Gathering; 0 = none: on a CPU a step
                  takes as long as its tokens, so that nothing is won by prompts in fewer steps
    """

    min_num_seqs: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_bulk_tokens: int
    cache_share: float
    empty_share: float = 0.0


# The engine has a GPU's memory for itself: what a step needs is measured, and what graphs need is estimated. Below
# some 1,500 tokens, a step on a GPU spends its time on reading experts. On a CPU 64 rows are multiplied for longer than
# weights are read: more sequences give no more tokens a second, and each waits longer.
DEFAULTS = {"cpu": DeviceDefaults(64, 64, 512, 128, 0.5), "cuda": DeviceDefaults(256, 1024, 2048, 512, 0.95, 1 / 32)}


def mean_cached_tokens(prompt_tokens: float, output_tokens: float) -> int:
    """Return how many tokens a running sequence has in the KV cache on average, from the means of its parts."""
    return max(1, round(prompt_tokens + output_tokens / 2))


def choose_step_limits(config: EngineConfig, device: str, cache_tokens: int) -> tuple[int, int]:
    """Return the maximum number of sequences and of tokens in a step.

    cache_tokens: that fit into the KV cache
    """
    defaults = DEFAULTS[device]
    max_num_seqs = config.max_num_seqs
    if max_num_seqs is None:
        length = config.mean_cached_tokens or mean_cached_tokens(PROMPT_TOKENS, OUTPUT_TOKENS)
        fitting = cache_tokens // min(length, config.max_model_len or length)
        whole = fitting // SEQS_STEP * SEQS_STEP
        max_num_seqs = min(max(defaults.min_num_seqs, whole), defaults.max_num_seqs)
    tokens = max(defaults.max_num_batched_tokens, TOKENS_PER_SEQ * max_num_seqs)
    return max_num_seqs, config.max_num_batched_tokens or tokens
