"""RoutingMethod: the rules by which experts are chosen and weighted, on every device. kernels/cpu/route.py has them."""

from typing import Literal

RoutingMethod = Literal["sparsemixer", "softmax", "softmax_all", "sigmoid"]
