"""Rules by which experts are chosen and weighted, on every device. kernels/cpu/route.py computes them."""

from functools import cache
from typing import Literal

import torch

RoutingMethod = Literal["sparsemixer", "softmax", "softmax_all", "sigmoid"]


@cache
def sparsemixer_threshold(jitter: float, dtype: torch.dtype) -> float:
    """Return the relative gap above which sparsemixer leaves a logit out: 2*jitter in the dtype of the logits.

    The reference compares in that dtype, in which 0.02 is 0.02001953125 (bfloat16).
    """
    return torch.tensor(2 * jitter, dtype=dtype).item()
