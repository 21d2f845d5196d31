"""The product that every GEMM here is made of: a block of weights times a block of rows."""

import triton
import triton.language as tl


@triton.jit
def multiply(
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
    """weight[columns] @ x[rows].T in fp32: [BLOCK_N, BLOCK_M], summed over k in order, BLOCK_K at a time.

    Weights take the side of the MMA that on Hopper is 64 wide however many rows there are: so one row and a thousand go
    through the same instruction, and few rows too are multiplied straight from shared memory.

    weight, x: [.., stride], of which the first `length` of each row are summed
    columns:   [BLOCK_N]; rows: [BLOCK_M] int64; IS_EVEN: whether BLOCK_K divides length
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
