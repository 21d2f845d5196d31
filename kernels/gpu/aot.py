"""What is launched on a GPU, listed so that it can be compiled and inspected on a machine that has none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel as one model, dtype and tile launch it.

    kernel:          the @triton.jit function
    signature:       argument name -> type ("*bf16", "i32", "fp32"); with ":16" behind where the launcher would find the
                     value divisible by 16, without which loads are not vectorised
    constexprs:      argument name -> value, integers equal to 1 among them
    has_wide_loads:  loads of 128 bits are expected
    wants_wgmma:     warp-group MMA is expected on compute capability 9.0
    targets:         compute capabilities it is launched on
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_wide_loads: bool = True
    wants_wgmma: bool = False
    targets: tuple[int, ...] = (80, 90)
