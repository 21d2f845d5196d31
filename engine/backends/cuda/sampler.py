"""CudaSampler: samples on a GPU. The host waits for the device only when the tokens of a step are read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moray.engine.backends.cuda.host_copy import HostCopy
from moray.engine.backends.cuda.penalties import CudaPenalties
from moray.engine.backends.cuda.sampling_columns import SamplingColumns, pack_row
from moray.engine.platform.transfer import to_device
from moray.engine.request import TokenLogprobs
from moray.engine.sampling.batch import Batch, Traits
from moray.engine.sampling.logit_processors import Allowed
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.engine.sampling.sampler import MIN_TEMPERATURE, PendingSamples, Sampler, SamplerOutput
from moray.kernels.gpu.allowed import keep_allowed
from moray.kernels.gpu.sampling import sample
from moray.kernels.gpu.token_logprobs import token_logprobs


class CudaSampler(Sampler):
    """Samples on a GPU the same tokens as the CPU's Sampler.

    wait_for: waits for an event on the device
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        wait_for: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ) -> None:
        super().__init__(vocab_size, eos_token_ids, CudaPenalties(vocab_size, device), Allowed(keep_allowed))
        self._device, self._wait_for = device, wait_for
        self._known: dict[RunningSample, tuple[bytes, Traits | None]] = {}  # row of SamplingColumns; None = plain
        self._batch: Batch | None = None  # of the last step, with its columns
        self._columns: SamplingColumns | None = None

    def launch(self, logits: Tensor, samples: Sequence[RunningSample]) -> PendingSamples:
        batch, columns = self._batch_of(samples)
        scores = logits
        if changes := batch.changes():
            scores = logits.to(torch.float32, copy=True)
            for processor, rows in changes:
                processor.apply(scores, samples, rows)
        token_ids = sample(scores, *columns.of_step())
        host_copy = HostCopy(token_ids, wait_for=self._wait_for)
        logprobs = self._logprobs_of(logits, token_ids, batch.logprobs) if batch.logprobs else None
        # All memory is allocated by now: a launch that ran out of memory has changed no state and can be repeated.
        if any(processor is self._penalties for processor, _ in changes):
            self._penalties.count(samples, token_ids)
        columns.count()

        def read() -> SamplerOutput:
            (host_ids,) = host_copy.wait()
            ids: list[int] = host_ids.tolist()
            found: list[TokenLogprobs | None] = [None] * len(ids)
            if logprobs is not None:
                asked = batch.logprobs
                for row, entry in zip(asked, logprobs.read([ids[row] for row in asked]), strict=True):
                    found[row] = None if ids[row] == NO_TOKEN else entry
            return SamplerOutput(ids, found)

        return PendingSamples(token_ids, read)

    def launch_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], ks: Sequence[int]
    ) -> Callable[[], list[TokenLogprobs]]:
        logprobs = _Logprobs(logits, to_device(token_ids, torch.int64, self._device), ks, self._wait_for)
        return lambda: logprobs.read(token_ids)

    def _logprobs_of(self, logits: Tensor, token_ids: Tensor, ks: dict[int, int]) -> "_Logprobs":
        """Launch the logprobs of some rows of a step. ks: row -> number of best tokens"""
        if len(ks) < len(logits):
            index = to_device(list(ks), torch.int64, self._device)
            logits, token_ids = logits[index], token_ids[index]
        # A row without a token has no logprobs either: its entry is dropped.
        return _Logprobs(logits, token_ids.clamp(min=0), list(ks.values()), self._wait_for)

    def release(self, sample: RunningSample) -> None:
        super().release(sample)
        self._known.pop(sample, None)
        if self._batch is not None and sample in self._batch.samples:
            self._batch = self._columns = None  # the sample must not live on here

    def _batch_of(self, samples: Sequence[RunningSample]) -> tuple[Batch, SamplingColumns]:
        """Return the batch and its columns: those of the last step, as long as it had the same samples."""
        if self._batch is None or self._columns is None or self._batch.samples != samples:
            known = self._known
            found = [known.get(sample) or self._learn(sample) for sample in samples]
            self._columns = SamplingColumns([row for row, _ in found], samples, self._device)
            traits = {i: of_row for i, (_, of_row) in enumerate(found) if of_row is not None}
            self._batch = Batch.of(samples, traits, self.processors)
        return self._batch, self._columns

    def _learn(self, sample: RunningSample) -> tuple[bytes, Traits | None]:
        params = sample.params
        temperature = 0.0 if params.is_greedy else max(params.temperature, MIN_TEMPERATURE)
        traits = Traits.of(sample, self.processors)
        row = pack_row(sample.seq, temperature, min(params.top_k, self.vocab_size))
        self._known[sample] = row, None if traits.is_plain else traits
        return self._known[sample]


class _Logprobs:
    """Computes the logprobs of some tokens, one a row of logits, and copies them to the host.

    token_ids: [num_rows] int64, on the device of the logits
    ks:        number of best tokens per row
    """

    def __init__(
        self, logits: Tensor, token_ids: Tensor, ks: Sequence[int], wait_for: Callable[[torch.cuda.Event], None]
    ) -> None:
        self._ks = ks
        self._host_copy = HostCopy(*token_logprobs(logits, token_ids, max(ks)), wait_for=wait_for)

    def read(self, token_ids: Sequence[int]) -> list[TokenLogprobs]:
        """Wait for the logprobs and return them. token_ids: the same tokens, as the host knows them by now"""
        logprobs, best_ids = (tensor.tolist() for tensor in self._host_copy.wait())
        return [
            TokenLogprobs(token_id, chosen, tuple(zip(ids[:k], best[:k], strict=True)))
            for token_id, k, (chosen, *best), ids in zip(token_ids, self._ks, logprobs, best_ids, strict=True)
        ]
