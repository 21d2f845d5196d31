"""gemm_tile: the product of a block of weights and a block of rows, which all GEMMs here consist of.

Formats of weights, the constexpr FORMAT; packed_weight.py makes all but the first:

dense           numbers of the dtype of x
int8 int4       codes in words of 32 bits, which become numbers of the dtype of x between memory and the MMA
fp8 fp4         the same, of float8_e4m3fn and of e2m1
fp8_fp8         float8_e4m3fn, multiplied by rows in float8_e4m3fn, which quantize_rows.py makes
"""

import triton
import triton.language as tl

from moray.kernels.gpu.e4m3 import from_e4m3


@triton.jit
def gemm_tile(
    weight,
    scales,
    zeros,
    columns,
    x,
    x_scales,
    rows,
    N,
    stride,
    length,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return weight[columns] @ x[rows].T in fp32, [BLOCK_N, BLOCK_M], summed over k in order, BLOCK_K at a time.

    Weights are the operand of the MMA that on Hopper is 64 wide whatever the number of rows. So one row and a thousand
    rows use the same instruction, and a few rows too are multiplied directly from shared memory. That operand may come
    from registers as well, where codes become numbers: they do not go through shared memory again.

    weight:     [.., stride], of which the first `length` numbers of each row are multiplied; for codes in words see
                packed_weight.py
    scales:     [num_groups, N] of the weight, fp32, or uint8 exponents for fp4; None if dense
    zeros:      [num_groups, N] int8, subtracted from the codes; None = none
    columns:    [BLOCK_N], rows of weight
    x:          [.., stride]
    x_scales:   fp32, one a row of x; None = none
    rows:       [BLOCK_M] int64, rows of x
    N:          rows of weight that there are
    GROUP_SIZE: inputs that share a scale; 0 = all
    IS_EVEN:    whether BLOCK_K divides length
    """
    if FORMAT == "dense" or FORMAT == "fp8_fp8":
        total = _plain_tile(
            weight, scales, columns, x, rows, N, stride, length, FORMAT, GROUP_SIZE, IS_EVEN, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        total = _packed_tile(
            weight,
            scales,
            zeros,
            columns,
            x,
            rows,
            N,
            stride,
            length,
            FORMAT,
            GROUP_SIZE,
            IS_EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if FORMAT != "dense" and GROUP_SIZE == 0:
        total *= _load_scales(scales + columns, FORMAT)[:, None]
    if x_scales is not None:
        total *= tl.load(x_scales + rows)[None, :]
    return total


@triton.jit
def _plain_tile(
    weight,
    scales,
    columns,
    x,
    rows,
    N,
    stride,
    length,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply numbers as they are in memory."""
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
        if FORMAT == "dense":
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        elif GROUP_SIZE == 0:
            # Hopper sums products of 8 bits with 14 bits only, so the sums of a block are added up in fp32.
            total += tl.dot(a, tl.trans(b))
        else:
            part = tl.dot(a, tl.trans(b))
            total += part * tl.load(scales + done // GROUP_SIZE * N + columns)[:, None]
        weight_block += BLOCK_K
        x_block += BLOCK_K
    return total


@triton.jit
def _packed_tile(
    weight,
    scales,
    zeros,
    columns,
    x,
    rows,
    N,
    stride,
    length,
    FORMAT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply codes in words: each plane of a word's codes is a product of its own, with neighbouring inputs.

    Where scales are of groups, the sum of a group is multiplied by its scale and added to the total: groups in order.
    """
    BITS: tl.constexpr = 4 if FORMAT == "int4" or FORMAT == "fp4" else 8
    WIDTH: tl.constexpr = BLOCK_K * BITS // 32  # words of a block, inputs of a plane
    PLANES: tl.constexpr = 32 // BITS
    GROUPS: tl.constexpr = 1 if GROUP_SIZE == 0 else max(1, BLOCK_K // GROUP_SIZE)  # in a block
    OF_GROUP: tl.constexpr = PLANES // GROUPS
    inputs = tl.arange(0, WIDTH)
    word_block = weight + columns[:, None] * (tl.cdiv(stride, BLOCK_K) * WIDTH) + inputs[None, :]
    x_block = x + rows[:, None] * stride + inputs[None, :]
    row_zero = None if zeros is None or GROUP_SIZE else tl.load(zeros + columns)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for done in range(0, length, BLOCK_K):
        words = tl.load(word_block)
        for group in tl.static_range(GROUPS):
            if GROUP_SIZE:
                offset = (done // GROUP_SIZE + group) * N
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                zero = None if zeros is None else tl.load(zeros + offset + columns)
            else:
                part = total
                zero = row_zero
            for i in tl.static_range(group * OF_GROUP, (group + 1) * OF_GROUP):
                if IS_EVEN:
                    b = tl.load(x_block + i * WIDTH)
                else:
                    b = tl.load(x_block + i * WIDTH, mask=(inputs < length - done - i * WIDTH)[None, :], other=0.0)
                a = _decode(words, i, zero, x.dtype.element_ty, FORMAT)
                part = tl.dot(a, tl.trans(b), part, input_precision="ieee")
            if GROUP_SIZE:
                total += part * _load_scales(scales + offset + columns, FORMAT)[:, None]
            else:
                total = part
        word_block += WIDTH
        x_block += BLOCK_K
    return total


@triton.jit
def _load_scales(scales, FORMAT: tl.constexpr):
    """Load scales as fp32: the bits of 2 ** (exponent - 127), whose least is no normal number."""
    loaded = tl.load(scales)
    if FORMAT == "fp4":
        loaded = tl.maximum(loaded.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    return loaded


@triton.jit
def _decode(words, PLANE: tl.constexpr, zero, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Return code PLANE of each word as a number of the given dtype, which holds it exactly.

    A GPU of compute capability 8.0 converts few integers a clock, and no e4m3. So an integer, which is stored with the
    bias that makes it positive, becomes the last bits of a number that is a power of two, which is then subtracted. The
    bits of an e2m1 number, as those of e4m3, are those of a 16-bit number of another exponent.

    zero: [rows of words] int8, subtracted from the code; None = none
    """
    if FORMAT == "fp8":
        number = from_e4m3((words >> (8 * PLANE)).to(tl.uint16), DTYPE)
    elif FORMAT == "fp4":
        code = (words >> (4 * PLANE)).to(tl.uint16)
        if tl.float16 == DTYPE:
            bits = ((code & 0x8) << 12) | ((code & 0x7) << 9)
            number = bits.to(tl.float16, bitcast=True) * 16384.0
        else:
            bits = ((code & 0x8) << 12) | ((code & 0x7) << 6)
            number = bits.to(tl.bfloat16, bitcast=True) * 8.507059173023462e37  # 2 ** 126
    else:
        BITS: tl.constexpr = 4 if FORMAT == "int4" else 8
        bits = (words >> (BITS * PLANE)) & ((1 << BITS) - 1)
        if tl.float16 == DTYPE:
            number = (bits.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
            bias = 1024.0 + (1 << (BITS - 1))
        elif BITS == 4:
            number = (bits.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            bias = 128.0 + (1 << (BITS - 1))
        else:
            number = (bits | 0x4B000000).to(tl.float32, bitcast=True)
            bias = 8388608.0 + (1 << (BITS - 1))
        if zero is not None:
            bias = (zero.to(tl.float32) + bias).to(number.dtype)[:, None]
        number -= bias
    return number.to(DTYPE)
