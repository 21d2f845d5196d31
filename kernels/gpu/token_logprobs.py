"""Compute logprobs of tokens on the device: of one given token a row, and of the row's best tokens, without a sort.

One program per row: a pass over the row finds the largest logit and its token, a second one adds up the weights, and
each further best token takes a pass more. So a row's bits depend on nothing but its logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu

MAX_BLOCK = 4096
NUM_WARPS = 8


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the logprobs under softmax(logits) of a token of each row, and of the row's best tokens.

    Best tokens are in order of falling logits, lowest id first among equals: rounding can give different logits the
    same logprob. A row with a NaN, or whose largest logit is infinite, has logprobs of NaN and any tokens.

    logits:     [num_rows, vocab_size], any floating dtype, contiguous
    token_ids:  [num_rows] int64
    k:          number of best tokens
    returns:    logprobs, [num_rows, 1 + k] fp32, the first column of token_ids; best tokens, [num_rows, k] int32;
                k is vocab_size at most
    """
    assert logits.is_contiguous(), "the kernel reads contiguous rows"
    num_rows, vocab_size = logits.shape
    k = min(k, vocab_size)
    logprobs = logits.new_empty(num_rows, 1 + k, dtype=torch.float32)
    best_ids = logits.new_empty(num_rows, k, dtype=torch.int32)
    if num_rows > 0:
        block = min(next_power_of_2(vocab_size), MAX_BLOCK)
        _token_logprobs_kernel[(num_rows,)](
            logits, token_ids, logprobs, best_ids, vocab_size, k, BLOCK=block, num_warps=NUM_WARPS
        )
    return logprobs, best_ids


@triton.jit(do_not_specialize=["k"])
def _token_logprobs_kernel(logits, token_ids, logprobs, best_ids, vocab_size, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    logprobs += row * (1 + k)
    value, token = _next_best(logits, vocab_size, float("inf"), -1, BLOCK)
    is_finite = tl.abs(value) < float("inf")
    largest = tl.where(is_finite, value, 0.0)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + lanes
        values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        sums += tl.exp(values - largest)
    log_sum = tl.where(is_finite, tl.log(tl.sum(sums)), float("nan"))
    chosen = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    tl.store(logprobs, chosen - largest - log_sum)

    for i in range(k):
        if i > 0:
            value, token = _next_best(logits, vocab_size, value, token, BLOCK)
        tl.store(logprobs + 1 + i, value - largest - log_sum)
        tl.store(best_ids + row * k + i, tl.minimum(token, vocab_size - 1))


@triton.jit
def _next_best(logits, vocab_size, last_value, last_token, BLOCK: tl.constexpr):
    """Return the first token that comes after (last_value, last_token) in order of falling logits and rising ids.

    Returns its logit and its id, which is vocab_size if there is none.
    """
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK], tl.int32) + vocab_size
    for start in range(0, vocab_size, BLOCK):
        tokens = start + lanes
        values = tl.load(logits + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        comes_after = (values < last_value) | ((values == last_value) & (tokens > last_token))
        # A lane's first token may have a logit of -inf, as the start value has.
        is_better = (values > best) | (ids == vocab_size)
        takes = comes_after & is_better & (tokens < vocab_size)
        best = tl.where(takes, values, best)
        ids = tl.where(takes, tokens, ids)
    value = tl.max(best)
    return value, tl.min(tl.where(best == value, ids, vocab_size))


def token_logprobs_ref(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` slowly and obviously: softmax and a stable sort."""
    logprobs = logits.double().log_softmax(1)
    best_ids = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    index = torch.cat((token_ids[:, None], best_ids), dim=1)
    return logprobs.gather(1, index).float(), best_ids.int()


def aot_variants(gpu: Gpu) -> list[Variant]:
    types = {"token_ids": "*i64:16", "logprobs": "*fp32:16", "best_ids": "*i32:16", "k": "i32"}
    return [
        Variant(
            f"token_logprobs {name}",
            _token_logprobs_kernel,
            types | {"logits": pointer, "vocab_size": vocab_size},
            {"BLOCK": MAX_BLOCK},
            NUM_WARPS,
            has_wide_loads=vocab_size == "i32:16",
        )
        for name, pointer, vocab_size in (
            ("bf16", "*bf16:16", "i32:16"),
            ("fp16", "*fp16:16", "i32:16"),
            ("fp32", "*fp32:16", "i32:16"),
            ("bf16, vocabulary of 32002", "*bf16:16", "i32"),
        )
    ]
