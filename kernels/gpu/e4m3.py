"""Convert numbers to codes of e4m3 and back, by their bits: a GPU below compute capability 8.9 has no such numbers."""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(codes, DTYPE: tl.constexpr, KEEPS_NAN: tl.constexpr = False):
    """Return the numbers of codes, in a dtype that holds them exactly. codes: uint16, of which the low byte counts

    The bits of a code are those of a 16-bit number of another exponent; NaN, whose code is beyond that of the largest
    number, becomes 480 unless KEEPS_NAN.
    """
    if tl.float16 == DTYPE:
        bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        number = bits.to(tl.float16, bitcast=True) * 256.0
    else:
        bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 4)
        number = bits.to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    if KEEPS_NAN:
        number = tl.where((codes & 0x7F) == 0x7F, float("nan"), number)
    return number.to(DTYPE)


@triton.jit
def to_e4m3(x):
    """Return the codes, uint8, of numbers in fp32: as to_e4m3 of kernels/e4m3.py rounds."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    of_magnitude = magnitude.to(tl.int32, bitcast=True)
    # Adding half of the last bit that stays, and a little less where that bit is 0, rounds to nearest even.
    normal = ((of_magnitude + 0x7FFFF + ((of_magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # A sum from 2 ** 14 on is rounded to multiples of 2 ** -9, the least e4m3.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)  # 2 ** -6, the least normal number
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
