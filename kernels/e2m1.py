"""The numbers of e2m1, floats of 4 bits: a sign, two bits of exponent, and one of mantissa."""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; 8 more for the same with a minus
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))


def numbers_of(codes: Tensor) -> Tensor:
    """Return the numbers that quantized weights' codes stand for, in fp32.

    codes: int8, float8_e4m3fn, or e2m1 in uint8, one code a byte
    """
    if codes.dtype == torch.uint8:
        return torch.tensor(VALUES, device=codes.device)[codes.int()]
    return codes.float()
