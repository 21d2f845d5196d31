"""CudaPenalties: the penalties of a GPU, with the tokens that each sample has seen counted on the device.

The host learns a token only after the next step has been launched, so it cannot count in time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moray.engine.platform.transfer import to_device
from moray.engine.sampling.logit_processors import Penalties, penalized_prompt
from moray.engine.sampling.running_sample import RunningSample
from moray.kernels.gpu.penalties import count_tokens, penalize

NO_SLOT = -1  # slot of a sample without penalties
MIN_SLOTS = 8  # slots that the first allocation of the table makes; later ones double it


class CudaPenalties(Penalties):
    """Applies penalties on a GPU, from a table with a slot for each sample that has penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(vocab_size)
        self._device = device
        # [slots, vocab_size], see kernels/gpu/penalties.py; grows with the number of samples that have penalties
        self._seen_table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free_slots: list[int] = []
        self._slots: dict[RunningSample, int] = {}
        self._slots_of_step = torch.zeros(0, dtype=torch.int32, device=device)  # as apply() found them, for count()

    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        slots, device = [NO_SLOT] * len(samples), self._device
        for row in rows:
            slots[row] = self._slot(samples[row])
        self._slots_of_step = to_device(slots, torch.int32, device)
        params = [sample.params for sample in samples]
        penalize(
            logits,
            self._seen_table,
            self._slots_of_step,
            to_device([p.repetition_penalty for p in params], torch.float32, device),
            to_device([p.presence_penalty for p in params], torch.float32, device),
            to_device([p.frequency_penalty for p in params], torch.float32, device),
        )

    def count(self, samples: Sequence[RunningSample], token_ids: Tensor) -> None:
        count_tokens(self._seen_table, self._slots_of_step, token_ids)

    def release(self, sample: RunningSample) -> None:
        slot = self._slots.pop(sample, None)
        if slot is not None:
            self._free_slots.append(slot)

    def _slot(self, sample: RunningSample) -> int:
        if sample not in self._slots:
            if not self._free_slots:
                num_slots = len(self._seen_table)
                more = self._seen_table.new_zeros(max(MIN_SLOTS, num_slots), self._vocab_size)
                self._seen_table = torch.cat([self._seen_table, more])
                self._free_slots = list(range(num_slots, len(self._seen_table)))
            slot = self._free_slots[-1]
            self._seen_table[slot] = 0
            if prompt := penalized_prompt(sample):
                self._seen_table[slot].index_fill_(0, to_device(prompt, torch.int64, self._device), 1)
            # Only now that its prompt is in the table: a launch that runs out of memory may not change a sample.
            self._slots[sample] = self._free_slots.pop()
        return self._slots[sample]
