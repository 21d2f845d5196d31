"""gemm_tile: the product of a block of weights and a block of rows, which all GEMMs here consist of."""

import triton
import triton.language as tl


@triton.jit
def gemm_tile(
    weight,
    columns,
    x,
    rows,
    stride,
    length,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return weight[columns] @ x[rows].T in fp32, [BLOCK_N, BLOCK_M], summed over k in order, BLOCK_K at a time.

    Weights are the operand of the MMA that on Hopper is 64 wide whatever the number of rows. So one row and a thousand
    rows use the same instruction, and a few rows too are multiplied directly from shared memory.

    weight, x: [.., stride]; the first `length` numbers of each row are multiplied
    columns:   [BLOCK_N], rows of weight
    rows:      [BLOCK_M] int64, rows of x
    IS_EVEN:   whether BLOCK_K divides length
    """
    k = tl.arange(0, BLOCK_K)
    weight_block = weight + columns[:, None] * stride + k[None, :]
    x_block = x + rows[:, None] * stride + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for done in range(0, length, BLOCK_K):
        if IS_EVEN:
            a = tl.load(weight_block)
            b = tl.load(x_block)
        else:
            a = tl.load(weight_block, mask=(k < length - done)[None, :], other=0.0)
            b = tl.load(x_block, mask=(k < length - done)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        weight_block += BLOCK_K
        x_block += BLOCK_K
    return total
