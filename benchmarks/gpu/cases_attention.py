"""Cases of paged attention of Phi-3.5-MoE: decoding and chunks of prompts, with torch's attention as peer."""

import inspect
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.cases import Case, Op, in_turn, normal
from gpu.measure import Call, turns_for
from gpu.roofline import ITEM, Work
from moray.kernels.gpu import paged_attention as paged_attention_module
from moray.kernels.gpu.paged_attention import paged_attention

DTYPE = torch.bfloat16
BLOCK_SIZE = 16


class Attention:
    """Makes the cases.

    context:  keys of a decoding sequence
    prompt:   tokens of a prompt, some of which a step prefills
    """

    def __init__(self, device: torch.device, *, is_dry: bool) -> None:
        self.device = device
        self.heads, self.kv_heads, self.head_dim = (4, 2, 64) if is_dry else (32, 8, 128)
        self.context, self.prompt = (40, 32) if is_dry else (640, 512)

    def ops(self) -> list[Op]:
        return [Op("attention decode", self.decode, 1024), Op("attention prefill", self.prefill)]

    def decode(self, rows: int) -> Case:
        """Measure one query a sequence. torch's SDPA reads contiguous keys, which an engine does not have."""
        keys = rows * self.context
        num_bytes = self._key_bytes(keys)
        turns = turns_for(num_bytes)
        q = self.new(rows, self.heads, self.head_dim)
        caches = [self.caches(rows, self.context) for _ in range(turns)]
        starts = torch.arange(rows + 1, device=self.device, dtype=torch.int32)
        ours = [self._ours(q, *cache, starts, [self.context] * rows) for cache in caches]
        shape = rows, self.kv_heads, self.context, self.head_dim
        plain = [(self.new(*shape), self.new(*shape)) for _ in range(turns)]
        query = q[:, :, None]
        theirs = in_turn(lambda kv: F.scaled_dot_product_attention(query, kv[0], kv[1], enable_gqa=True), plain)
        work = Work(num_bytes, 4.0 * keys * self.heads * self.head_dim)
        peers = {"SDPA": theirs, "with 8 warps": [self._with_warps(8, call) for call in ours]}
        return Case("attention decode", rows, work, ours, peers, {"context": self.context})

    def prefill(self, rows: int) -> Case:
        """Measure the prefill of whole prompts, or of the last rows of one."""
        lengths = [self.prompt] * (rows // self.prompt) or [rows]
        count, length = len(lengths), lengths[0]
        rows = count * length
        before = self.prompt - length
        q = self.new(rows, self.heads, self.head_dim)
        starts = torch.arange(count + 1, device=self.device, dtype=torch.int32) * length
        keys = count * self.prompt
        pairs = count * (length * before + length**2 / 2)
        work = Work(self._key_bytes(keys) + 2 * ITEM * q.numel(), 4.0 * pairs * self.heads * self.head_dim)
        ours = [self._ours(q, *self.caches(count, self.prompt), starts, [self.prompt] * count) for _ in range(2)]
        peers: dict[str, list[Call]] = {"with 8 warps": [self._with_warps(8, call) for call in ours]}
        if before == 0:
            peers["SDPA"] = [self._sdpa(q, count)] * 2
            if self.device.type == "cuda":
                peers["varlen_attn"] = [self._varlen(q, starts)] * 2
        return Case("attention prefill", rows, work, ours, peers, {"prompts": count, "keys": self.prompt})

    def _ours(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, starts: Tensor, keys: list[int]
    ) -> Call:
        lens = torch.tensor(keys, device=self.device, dtype=torch.int32)
        return partial(paged_attention, q, k_cache, v_cache, tables, starts, lens, self.head_dim**-0.5)

    def caches(self, count: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys and values of `count` sequences in shuffled blocks, and the block tables."""
        width = -(-keys // BLOCK_SIZE)
        shape = count * width, self.kv_heads, BLOCK_SIZE, self.head_dim
        tables = torch.randperm(count * width, device=self.device).int().view(count, width)
        return self.new(*shape), self.new(*shape), tables

    def _with_warps(self, num_warps: int, call: Call) -> Call:
        """Return our call with another number of warps, which changes occupancy and the order of sums."""

        def run() -> object:
            with mock.patch.object(paged_attention_module, "_num_warps", lambda *_: num_warps):
                return call()

        return run

    def _sdpa(self, q: Tensor, count: int) -> Call:
        query = q.view(count, -1, self.heads, self.head_dim).transpose(1, 2)
        k, v = (self.new(count, self.kv_heads, query.shape[2], self.head_dim) for _ in "kv")
        return partial(F.scaled_dot_product_attention, query, k, v, is_causal=True, enable_gqa=True)

    def _varlen(self, q: Tensor, starts: Tensor) -> Call:
        """Return a call of varlen_attn with keys for every query head: torch 2.11 has no grouped heads there."""
        from torch.nn.attention.varlen import varlen_attn

        k, v = (self.new(*q.shape) for _ in "kv")
        is_old = "is_causal" in inspect.signature(varlen_attn).parameters
        options = {"is_causal": True} if is_old else {"window_size": (-1, 0)}
        return partial(varlen_attn, q, k, v, starts, starts, self.prompt, self.prompt, **options)

    def _key_bytes(self, keys: int) -> float:
        return 2.0 * ITEM * keys * self.kv_heads * self.head_dim

    def new(self, *shape: int) -> Tensor:
        return normal(*shape, dtype=DTYPE, device=self.device)
