"""The numbers of e2m1, floats of 4 bits, and of the scales of their groups, which are powers of two in a byte."""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; 8 more for the same with a minus
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))
EXPONENT_BIAS = 127  # what is added to a scale's exponent


def numbers_of(codes: Tensor) -> Tensor:
    """Return the numbers that quantized weights' codes stand for, in fp32.

    codes: int8, float8_e4m3fn, or e2m1 in uint8, one code a byte
    """
    if codes.dtype == torch.uint8:
        return torch.tensor(VALUES, device=codes.device)[codes.int()]
    return codes.float()


def exponents_of(scales: Tensor) -> Tensor:
    """Return the biased exponents of scales, uint8.

    Raises ValueError if a scale is no power of two from 2^-127 to 2^127.
    """
    mantissas, exponents = torch.frexp(scales.float())  # of numbers from 0.5 to 1
    biased = exponents + EXPONENT_BIAS - 1
    if not bool(((mantissas == 0.5) & (biased >= 0) & (biased <= 2 * EXPONENT_BIAS)).all()):
        raise ValueError("a scale of fp4 codes is no power of two from 2^-127 to 2^127")
    return biased.to(torch.uint8)


def scales_of(exponents: Tensor) -> Tensor:
    """Return the scales with these biased exponents, in fp32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - EXPONENT_BIAS)
