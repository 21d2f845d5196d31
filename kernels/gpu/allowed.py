"""Forbid the tokens that a grammar does not allow, from packed masks, on the device."""

import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.cpu.allowed import keep_allowed_ref
from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.tuning import Gpu

__all__ = ["aot_variants", "keep_allowed", "keep_allowed_ref"]

BLOCK = 4096  # tokens per program; 32 of them share a word


def keep_allowed(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    logits:  [num_rows, vocab_size] fp32, contiguous
    masks:   [num_masks, at least vocab_size / 32] int32, contiguous; token i is allowed if bit i % 32 of word i / 32
             is set
    rows:    [num_masks] int32, each mask's row of the logits
    """
    num_masks, num_words = masks.shape
    vocab_size = logits.shape[1]
    if num_masks > 0:
        _keep_allowed_kernel[(num_masks, cdiv(vocab_size, BLOCK))](logits, masks, rows, vocab_size, num_words, BLOCK)


@triton.jit
def _keep_allowed_kernel(logits, masks, rows, vocab_size, num_words, BLOCK: tl.constexpr):
    mask = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    words = tl.load(masks + mask.to(tl.int64) * num_words + tokens // 32, mask=inside, other=-1)
    is_forbidden = inside & (((words >> (tokens % 32)) & 1) == 0)
    row = tl.load(rows + mask).to(tl.int64)
    tl.store(logits + row * vocab_size + tokens, float("-inf"), mask=is_forbidden)


def aot_variants(gpu: Gpu) -> list[Variant]:
    signature = {"logits": "*fp32:16", "masks": "*i32:16", "rows": "*i32:16", "vocab_size": "i32", "num_words": "i32"}
    return [
        Variant("keep_allowed", _keep_allowed_kernel, signature, {"BLOCK": BLOCK}, has_wide_loads=False),
        Variant(
            "keep_allowed, vocabulary of 32000",
            _keep_allowed_kernel,
            signature | {"vocab_size": "i32:16"},
            {"BLOCK": BLOCK},
            has_wide_loads=False,
        ),
    ]
