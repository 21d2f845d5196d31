"""Penalties on tokens that have been seen, from a table of counts that lives on the device.

The table is dense, a row for each sequence that has penalties, because of how steps overlap: the host learns a step's
tokens only after the next one has been launched, so the device itself has to count them. Counting in a dense row is one
load and one store at a fixed address, the shapes are those of the table whatever has been seen, so a captured graph
replays it; a list of seen tokens would have to be searched first. A row costs 4 bytes a token of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.aot import Variant

BLOCK = 2048
ROWS = 128


def penalize(
    logits: Tensor, seen: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Lower, in place, the logits of tokens that have been seen.

    logits:      [num_rows, vocab_size], fp32, contiguous
    seen:        [num_slots, vocab_size] int32: 0 never, 1 in the prompt alone, 1 + n generated n times
    slots:       [num_rows] int32, each row's row of `seen`; -1: no penalties
    repetition:  [num_rows] fp32; divides positive logits and multiplies negative ones, as in Hugging Face
    presence:    [num_rows] fp32; subtracted once from tokens generated, as in OpenAI's API
    frequency:   [num_rows] fp32; subtracted as often as the token was generated
    """
    num_rows, vocab_size = logits.shape
    if num_rows > 0:
        # Without contraction to fused multiply-add: the very same numbers as on the CPU.
        _penalize_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
            logits, seen, slots, repetition, presence, frequency, vocab_size, BLOCK, enable_fp_fusion=False
        )


def record(seen: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Count each row's token in the row's slot, in place.

    seen:       [num_slots, vocab_size] int32, as in `penalize`
    slots:      [num_rows] int32, -1: count nothing; no slot twice
    token_ids:  [num_rows] int64, -1: count nothing
    """
    num_rows = len(slots)
    if num_rows > 0:
        _record_kernel[(triton.cdiv(num_rows, ROWS),)](seen, slots, token_ids, num_rows, seen.shape[1], ROWS)


@triton.jit
def _penalize_kernel(logits, seen, slots, repetition, presence, frequency, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        times = tl.load(seen + slot.to(tl.int64) * vocab_size + tokens, mask=inside, other=0)
        is_seen = times > 0
        place = logits + row.to(tl.int64) * vocab_size + tokens
        values = tl.load(place, mask=is_seen, other=0.0)
        factor = tl.load(repetition + row)
        values = tl.where(values < 0, values * factor, tl.div_rn(values, factor))
        counts = (times - 1).to(tl.float32)
        values -= counts * tl.load(frequency + row)
        values -= (counts > 0).to(tl.float32) * tl.load(presence + row)
        tl.store(place, values, mask=is_seen)


@triton.jit(do_not_specialize=["num_rows"])
def _record_kernel(seen, slots, token_ids, num_rows, vocab_size, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    token = tl.load(token_ids + rows, mask=rows < num_rows, other=-1)
    is_counted = (slot >= 0) & (token >= 0)
    place = seen + slot * vocab_size + token
    times = tl.load(place, mask=is_counted, other=0)
    tl.store(place, tl.maximum(times, 1) + 1, mask=is_counted)


def penalize_ref(
    logits: Tensor, seen: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Slow and obvious `penalize`."""
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before, times = logits[row], seen[slot]
            after = torch.where(before < 0, before * repetition[row], before / repetition[row])
            after = after - (times - 1) * frequency[row] - (times > 1) * presence[row]
            logits[row] = torch.where(times > 0, after, before)


def record_ref(seen: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """Slow and obvious `record`."""
    for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
        if slot >= 0 and token >= 0:
            seen[slot, token] = max(int(seen[slot, token]), 1) + 1


def aot_variants() -> list[Variant]:
    floats = dict.fromkeys(("logits", "repetition", "presence", "frequency"), "*fp32:16")
    counts = {"seen": "*i32:16", "slots": "*i32:16", "vocab_size": "i32:16"}
    recorded = counts | {"token_ids": "*i64:16", "num_rows": "i32"}
    return [
        Variant("penalize", _penalize_kernel, floats | counts, {"BLOCK": BLOCK}),
        Variant("record", _record_kernel, recorded, {"ROWS": ROWS}, has_wide_loads=False),
    ]
