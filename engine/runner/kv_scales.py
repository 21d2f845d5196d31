"""Find the scales of a KV cache of e4m3: those that the checkpoint has, or from the model's own keys and values.

Scales that a checkpoint does not have are chosen after each load, from a prompt of random tokens. They depend on the
model alone: on no user's data, no batch, no number of ranks and no worker. They are powers of two, so that rounding
somewhere in the model, which differs between devices, changes none unless a largest number is at the edge of two.
"""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError
from moray.engine.layers.attention import attention_layers
from moray.engine.quantization.kv_cache import CALIBRATION_VERSION, find_scales

LARGEST_CODE = 448.0  # of e4m3
# How much larger than in the prompt a key or value may be. It costs almost nothing: the error of a float is relative,
# and numbers down to 2 ** -11 of the largest keep all of their bits.
MARGIN = 4.0
CALIBRATION_TOKENS = 256


def calibration_prompt(config: ModelConfig) -> list[int]:
    """Return the tokens by which scales are chosen: the first one of texts, if there is one, and random ones."""
    original = config.rope.original_max_position_embeddings or config.max_position_embeddings
    num_tokens = min(CALIBRATION_TOKENS, original, config.max_position_embeddings)
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    return (first + [_random(i) % config.vocab_size for i in range(num_tokens)])[:num_tokens]


def _random(number: int) -> int:
    """Return the same random number for a number everywhere and always."""
    return int.from_bytes(sha256(f"calibration {CALIBRATION_VERSION} {number}".encode()).digest()[:8], "big")


def scales_for(largest: Tensor) -> Tensor:
    """Return the scales for heads whose largest magnitudes in the calibration are given: powers of two.

    A head that is all zeros, or no numbers, gets 1.
    """
    largest = largest.double()
    exponents = (largest * MARGIN / LARGEST_CODE).log2().ceil()
    return torch.where(largest.isfinite() & (largest > 0), exponents.exp2(), 1.0).float()


def load_kv_scales(model: nn.Module, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Give each attention layer the scales that the checkpoint has: one number, or one for each KV head.

    Raises CheckpointError naming a scale of another shape, or that is not above 0.
    """
    names = find_scales(checkpoint.tensors)
    stored = checkpoint.read(set(names.values()), torch.device("cpu"))
    for layer, attention in enumerate(attention_layers(model)):
        rows = [_of_heads(names[layer, part], stored, config) for part in "kv"]
        attention.take_kv_scales(torch.stack(rows))


def _of_heads(name: str, stored: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """Return a stored scale of each KV head."""
    scale, heads = stored[name], config.num_kv_heads
    if scale.numel() not in (1, heads) or not scale.is_floating_point() or scale.dtype.itemsize == 1:
        raise CheckpointError(
            f"{name} is {list(scale.shape)} {str(scale.dtype).removeprefix('torch.')}; a scale of the KV cache is one "
            f"float, or {heads}, one for each KV head. Set kv_cache_dtype to model to leave it out."
        )
    scale = scale.float().flatten()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{name} has a scale of {scale.min():g} to {scale.max():g}; all must be above 0.")
    return scale.expand(heads)
