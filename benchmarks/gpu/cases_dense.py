"""Cases of the linear layers, norms and rope of Phi-3.5-MoE, with torch's operations as peers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.cases import Case, Op, in_turn, normal
from gpu.measure import turns_for
from gpu.roofline import ITEM, Work
from gpu.roofline import linear as linear_work
from moray.kernels.gpu.linear import linear
from moray.kernels.gpu.norms import add_layer_norm
from moray.kernels.gpu.rope_kv import rope_kv

DTYPE = torch.bfloat16


class Dense:
    """Makes the cases.

    hidden:                     width of the model
    heads, kv_heads, head_dim:  shape of its attention
    """

    def __init__(self, device: torch.device, *, is_dry: bool) -> None:
        self.device = device
        self.hidden, self.heads, self.kv_heads, self.head_dim = (64, 4, 2, 16) if is_dry else (4096, 32, 8, 128)
        self.qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.vocab, self.num_experts = (160, 4) if is_dry else (32064, 16)
        self.block_size = 16

    def ops(self) -> list[Op]:
        wide = self.heads * self.head_dim
        linears = {
            "qkv_proj": (self.qkv, self.hidden, True),
            "o_proj": (self.hidden, wide, True),
            "router": (self.num_experts, self.hidden, False),
            "lm_head": (self.vocab, self.hidden, True),
        }
        ops = [
            Op(f"linear {name}", partial(self.linear, name, *shape), 512 if name == "lm_head" else 4096)
            for name, shape in linears.items()
        ]
        return [*ops, Op("add_layer_norm", self.norm), Op("rope_kv", self.rope)]

    def linear(self, name: str, n: int, k: int, has_bias: bool, rows: int) -> Case:
        turns = turns_for(ITEM * n * k)
        x, weights = self._new(rows, k), list(self._new(turns, n, k, std=k**-0.5).unbind())
        bias = self._new(n) if has_bias else None
        return Case(
            f"linear {name}",
            rows,
            linear_work(rows, n, k),
            in_turn(lambda weight: linear(x, weight, bias), weights),
            {"cuBLAS": in_turn(lambda weight: F.linear(x, weight, bias), weights)},
        )

    def norm(self, rows: int) -> Case:
        x, residual = self._new(rows, self.hidden), self._new(rows, self.hidden)
        weight, bias = self._new(self.hidden), self._new(self.hidden)

        def plain() -> Tensor:
            return F.layer_norm(x + residual, weight.shape, weight, bias)

        ours = partial(add_layer_norm, x, residual, weight, bias, 1e-5)
        num_bytes = ITEM * rows * self.hidden * 4
        return Case("add_layer_norm", rows, Work(num_bytes), [ours] * 2, {"torch, two kernels": [plain] * 2})

    def rope(self, rows: int) -> Case:
        qkv, angles = self._new(rows, self.qkv), torch.randn(rows, self.head_dim // 2, device=self.device)
        num_blocks = rows // self.block_size + 1
        k_cache, v_cache = (self._new(num_blocks, self.kv_heads, self.block_size, self.head_dim) for _ in "kv")
        slots = torch.randperm(num_blocks * self.block_size, device=self.device)[:rows]
        call = partial(rope_kv, qkv, angles.cos(), angles.sin(), k_cache, v_cache, slots, self.heads)
        num_bytes = rows * (2 * ITEM * self.qkv + 4 * self.head_dim)
        return Case("rope_kv", rows, Work(num_bytes), [call] * 2)

    def _new(self, *shape: int, std: float = 1.0) -> Tensor:
        return normal(*shape, dtype=DTYPE, device=self.device, std=std)
