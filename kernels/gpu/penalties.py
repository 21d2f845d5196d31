"""Penalties on tokens that have been seen, from a table of counts on the device.

The table is dense, with a row for each sequence that has penalties, because steps overlap: the host learns a step's
tokens only after the next step has been launched, so the device has to count them. In a dense row, counting is one load
and one store at a fixed address, and the shapes are those of the table whatever has been seen, so a captured graph can
replay it; a list of seen tokens would have to be searched first. A row costs 4 bytes per token of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import cdiv
from moray.kernels.gpu.tuning import Gpu

BLOCK = 2048  # tokens per program of _penalize_kernel
ROWS = 128  # rows per program of _count_tokens_kernel


def penalize(
    logits: Tensor, seen: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Apply penalties, in place, to the logits of tokens that have been seen.

    logits:      [num_rows, vocab_size], fp32, contiguous
    seen:        [num_slots, vocab_size] int32: 0 = never seen, 1 = only in the prompt, 1 + n = generated n times
    slots:       [num_rows] int32, each row's row of `seen`; -1 = no penalties
    repetition:  [num_rows] fp32; divides positive logits and multiplies negative ones, as in Hugging Face
    presence:    [num_rows] fp32; subtracted once from generated tokens, as in OpenAI's API
    frequency:   [num_rows] fp32; subtracted once for each time the token was generated
    """
    num_rows, vocab_size = logits.shape
    if num_rows > 0:
        # Without contraction to fused multiply-add, the numbers are exactly those of the CPU.
        _penalize_kernel[(num_rows, cdiv(vocab_size, BLOCK))](
            logits, seen, slots, repetition, presence, frequency, vocab_size, BLOCK, enable_fp_fusion=False
        )


def count_tokens(seen: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Count each row's token in the row's slot, in place.

    seen:       [num_slots, vocab_size] int32, see `penalize`
    slots:      [num_rows] int32, all different; -1 = count nothing
    token_ids:  [num_rows] int64; -1 = count nothing
    """
    num_rows = len(slots)
    if num_rows > 0:
        _count_tokens_kernel[(cdiv(num_rows, ROWS),)](seen, slots, token_ids, num_rows, seen.shape[1], ROWS)


@triton.jit
def _penalize_kernel(logits, seen, slots, repetition, presence, frequency, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        times = tl.load(seen + slot.to(tl.int64) * vocab_size + tokens, mask=inside, other=0)
        is_seen = times > 0
        address = logits + row.to(tl.int64) * vocab_size + tokens
        values = tl.load(address, mask=is_seen, other=0.0)
        factor = tl.load(repetition + row)
        values = tl.where(values < 0, values * factor, tl.div_rn(values, factor))
        counts = (times - 1).to(tl.float32)
        values -= counts * tl.load(frequency + row)
        values -= (counts > 0).to(tl.float32) * tl.load(presence + row)
        tl.store(address, values, mask=is_seen)


@triton.jit(do_not_specialize=["num_rows"])
def _count_tokens_kernel(seen, slots, token_ids, num_rows, vocab_size, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    token = tl.load(token_ids + rows, mask=rows < num_rows, other=-1)
    is_counted = (slot >= 0) & (token >= 0)
    address = seen + slot * vocab_size + token
    times = tl.load(address, mask=is_counted, other=0)
    tl.store(address, tl.maximum(times, 1) + 1, mask=is_counted)


def penalize_ref(
    logits: Tensor, seen: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Compute `penalize` slowly and obviously."""
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before, times = logits[row], seen[slot]
            after = torch.where(before < 0, before * repetition[row], before / repetition[row])
            after = after - (times - 1) * frequency[row] - (times > 1) * presence[row]
            logits[row] = torch.where(times > 0, after, before)


def count_tokens_ref(seen: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Compute `count_tokens` slowly and obviously."""
    for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
        if slot >= 0 and token >= 0:
            seen[slot, token] = max(int(seen[slot, token]), 1) + 1


def aot_variants(gpu: Gpu) -> list[Variant]:
    floats = dict.fromkeys(("logits", "repetition", "presence", "frequency"), "*fp32:16")
    counts = {"seen": "*i32:16", "slots": "*i32:16", "vocab_size": "i32:16"}
    count_types = counts | {"token_ids": "*i64:16", "num_rows": "i32"}
    return [
        Variant("penalize", _penalize_kernel, floats | counts, {"BLOCK": BLOCK}),
        Variant(
            "penalize, vocabulary of 32002",
            _penalize_kernel,
            floats | counts | {"vocab_size": "i32"},
            {"BLOCK": BLOCK},
            has_wide_loads=False,
        ),
        Variant("count_tokens", _count_tokens_kernel, count_types, {"ROWS": ROWS}, has_wide_loads=False),
    ]
