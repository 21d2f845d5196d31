"""DeviceSampler: the Sampler on a GPU. Nothing waits for the device until a step's tokens are read.

The same tokens as Sampler's, which holds the order of things. Penalties count on the device, in a table with a slot
for each row that has some: the host learns a token only after the next step has been launched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import TokenLogprobs
from engine.sampler import (
    LEAST_TEMPERATURE,
    NO_TOKEN,
    Sampled,
    Sampler,
    SamplerOutput,
    SamplerRow,
    add_bias,
    ban_stop_tokens,
)
from engine.transfer import OnItsWay, to_device
from kernels.gpu.penalties import penalize, record
from kernels.gpu.sampling import sample

NO_SLOT = -1
LEAST_SLOTS = 8


class DeviceSampler(Sampler):
    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        super().__init__(vocab_size, eos_token_ids)
        self._device = device
        # [slots, vocab_size], as kernels/gpu/penalties.py has it; grows with the rows that have penalties
        self._seen_table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free_slots: list[int] = []
        self._slots: dict[SamplerRow, int] = {}

    def launch(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Sampled:
        scores, slots = logits, self._find_slots(rows)
        if any(row.is_adjusted for row in rows):
            scores = logits.to(torch.float32, copy=True)
            add_bias(scores, rows)
            self._penalize(scores, rows, slots)
            ban_stop_tokens(scores, rows)
        token_ids = self._draw(scores, rows)
        if slots is not None:
            record(self._seen_table, slots, token_ids)
        for row in rows:
            row.num_generated += 1
        on_its_way, logprobs = OnItsWay(token_ids), _Logprobs.of(logits, rows, token_ids)

        def read() -> SamplerOutput:
            (host,) = on_its_way.wait()
            ids: list[int] = host.tolist()
            return SamplerOutput(ids, [None] * len(ids) if logprobs is None else logprobs.read(ids))

        return Sampled(token_ids, read)

    def forget(self, row: SamplerRow) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free_slots.append(slot)

    def _draw(self, scores: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        params, device = [row.params for row in rows], self._device
        temperatures = [0.0 if p.is_greedy else max(p.temperature, LEAST_TEMPERATURE) for p in params]
        return sample(
            scores,
            to_device(temperatures, torch.float32, device),
            to_device([min(p.top_k, self.vocab_size) for p in params], torch.int32, device),
            to_device([p.top_p for p in params], torch.float64, device),
            to_device([p.min_p for p in params], torch.float64, device),
            to_device([_signed(row.stream_key) for row in rows], torch.int64, device),
            to_device([row.sample for row in rows], torch.int32, device),
            to_device([row.num_generated for row in rows], torch.int64, device),
        )

    def _penalize(self, scores: Tensor, rows: Sequence[SamplerRow], slots: Tensor | None) -> None:
        if slots is None:
            return
        params, device = [row.params for row in rows], self._device
        penalize(
            scores,
            self._seen_table,
            slots,
            to_device([p.repetition_penalty for p in params], torch.float32, device),
            to_device([p.presence_penalty for p in params], torch.float32, device),
            to_device([p.frequency_penalty for p in params], torch.float32, device),
        )

    def _find_slots(self, rows: Sequence[SamplerRow]) -> Tensor | None:
        """Each row's slot in the table of seen tokens; None where no row has penalties."""
        if not any(row.has_penalties for row in rows):
            return None
        slots = [self._slot(row) if row.has_penalties else NO_SLOT for row in rows]
        return to_device(slots, torch.int32, self._device)

    def _slot(self, row: SamplerRow) -> int:
        if row not in self._slots:
            if not self._free_slots:
                num_slots = len(self._seen_table)
                more = self._seen_table.new_zeros(max(LEAST_SLOTS, num_slots), self.vocab_size)
                self._seen_table = torch.cat([self._seen_table, more])
                self._free_slots = list(range(num_slots, len(self._seen_table)))
            slot = self._slots[row] = self._free_slots.pop()
            self._seen_table[slot] = 0
            if row.prompt_token_ids:
                self._seen_table[slot].index_fill_(0, to_device(row.prompt_token_ids, torch.int64, self._device), 1)
        return self._slots[row]


class _Logprobs:
    """Logprobs of the rows that asked. A stable sort, so that equals come lowest id first, as on the CPU."""

    def __init__(self, logits: Tensor, token_ids: Tensor, ks: dict[int, int]) -> None:
        index = to_device(list(ks), torch.int64, logits.device)
        scores = logits[index].float()
        logprobs = scores.log_softmax(1)
        chosen = logprobs.gather(1, token_ids[index].clamp(min=0)[:, None])
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : max(ks.values())]
        self._ks = ks
        self._on_their_way = OnItsWay(chosen, logprobs.gather(1, best), best)

    @classmethod
    def of(cls, logits: Tensor, rows: Sequence[SamplerRow], token_ids: Tensor) -> "_Logprobs | None":
        ks = {i: row.params.logprobs for i, row in enumerate(rows)}
        asked = {i: k for i, k in ks.items() if k is not None}
        return cls(logits, token_ids, asked) if asked else None

    def read(self, token_ids: list[int]) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(token_ids)
        chosen, values, ids = (tensor.tolist() for tensor in self._on_their_way.wait())
        for (row, k), (logprob,), top, top_ids in zip(self._ks.items(), chosen, values, ids, strict=True):
            if token_ids[row] != NO_TOKEN:
                found[row] = TokenLogprobs(token_ids[row], logprob, tuple(zip(top_ids[:k], top[:k], strict=True)))
        return found


def _signed(key: int) -> int:
    """The 64 bits of a stream key as int64."""
    return key - 2**64 if key >= 2**63 else key
