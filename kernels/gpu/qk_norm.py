"""Normalise the queries and keys of fused qkv rows on the GPU, in place."""

import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.gpu.aot import Variant
from moray.kernels.gpu.sizes import next_power_of_2
from moray.kernels.gpu.tuning import Gpu


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float) -> None:
    """Apply an RMSNorm to each of the leading segments of every row, as kernels/cpu/qk_norm.py does.

    qkv:       [num_tokens, width], contiguous, changed in place
    q_weight:  [columns of a segment of queries]
    k_weight:  [columns of a segment of keys]
    """
    assert qkv.is_contiguous(), "qk_norm reads contiguous rows"
    constexprs = _constexprs(qkv.shape[1], num_q, len(q_weight), len(k_weight))
    grid = (len(qkv), num_q + num_k)
    _qk_norm_kernel[grid](qkv, q_weight, k_weight, eps, **constexprs, num_warps=_num_warps(constexprs["BLOCK"]))


def _constexprs(width: int, num_q: int, q_size: int, k_size: int) -> dict[str, int]:
    block = next_power_of_2(max(q_size, k_size))
    return {"WIDTH": width, "NUM_Q": num_q, "Q_SIZE": q_size, "K_SIZE": k_size, "BLOCK": block}


def _num_warps(block: int) -> int:
    """Return the number of warps, which follows from the model alone: it determines the order of a sum."""
    return min(8, max(1, block // 256))


@triton.jit
def _qk_norm_kernel(
    qkv,
    q_weight,
    k_weight,
    eps,
    WIDTH: tl.constexpr,
    NUM_Q: tl.constexpr,
    Q_SIZE: tl.constexpr,
    K_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise one segment of one token per program."""
    segment = tl.program_id(1)
    is_q = segment < NUM_Q
    size = tl.where(is_q, Q_SIZE, K_SIZE)
    first = tl.where(is_q, segment * Q_SIZE, NUM_Q * Q_SIZE + (segment - NUM_Q) * K_SIZE)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    row = qkv + tl.program_id(0).to(tl.int64) * WIDTH + first
    values = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    of_q = tl.load(q_weight + columns, mask=inside & is_q, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + columns, mask=inside & (segment >= NUM_Q), other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values) / size + eps)
    dtype: tl.constexpr = qkv.dtype.element_ty
    values = values.to(dtype).to(tl.float32) * tl.where(is_q, of_q, of_k)  # rounded before the weight, as all RMSNorms
    tl.store(row + columns, values.to(dtype), mask=inside)


def aot_variants(gpu: Gpu) -> list[Variant]:
    """Return heads of Qwen3-30B-A3B, and whole rows of OLMoE-1B-7B."""
    variants = []
    for name, dtype, width, num_q, q_size, k_size in (
        ("qwen3-30b-a3b", "bf16", 40 * 128, 32, 128, 128),
        ("olmoe-1b-7b", "bf16", 3 * 2048, 1, 2048, 2048),
        ("olmoe-1b-7b fp32", "fp32", 3 * 2048, 1, 2048, 2048),
    ):
        signature = dict.fromkeys(("qkv", "q_weight", "k_weight"), f"*{dtype}:16") | {"eps": "fp32"}
        constexprs = _constexprs(width, num_q, q_size, k_size)
        warps, is_row = _num_warps(constexprs["BLOCK"]), num_q == 1  # a thread has 8 bytes of a head
        variants.append(
            Variant(f"qk_norm {name}", _qk_norm_kernel, signature, constexprs, warps, has_wide_loads=is_row)
        )
    return variants
