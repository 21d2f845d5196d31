"""Variant: a kernel launch described so that it can be compiled and inspected on a machine without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moray.kernels.gpu.tuning import Gpu

# A GPU of each compute capability that kernels are compiled for: A100, A10G, L4 and L40S, H100 and H200, B200, RTX
# PRO 6000. The bytes of shared memory are those of CUDA's programming guide.
GPUS = {
    80: Gpu("a100", (8, 0), 166_912),
    86: Gpu("a10g", (8, 6), 101_376),
    89: Gpu("l4", (8, 9), 101_376),
    90: Gpu("h100", (9, 0), 232_448),
    100: Gpu("b200", (10, 0), 232_448),
    120: Gpu("rtx-pro-6000", (12, 0), 101_376),
}


@dataclass(frozen=True)
class Variant:
    """Describes a kernel as one model, dtype and tile launch it.

    kernel:          the @triton.jit function
    signature:       argument name -> type ("*bf16", "i32", "fp32"); with the suffix ":16" if the launcher finds the
                     value divisible by 16, without which loads are not vectorised
    constexprs:      argument name -> value, including integers equal to 1
    has_wide_loads:  loads of 128 bits are expected
    wants_wgmma:     warp-group MMA is expected on compute capability 9.0
    may_spill:       registers may spill: the variant is a reference for others, not for speed
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_wide_loads: bool = True
    wants_wgmma: bool = False
    may_spill: bool = False
