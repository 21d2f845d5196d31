"""CudaSampler: samples on a GPU. The host waits for the device only when the tokens of a step are read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moray.engine.backends.cuda.host_copy import HostCopy
from moray.engine.backends.cuda.penalties import CudaPenalties
from moray.engine.platform.transfer import to_device
from moray.engine.request import TokenLogprobs
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

    def launch(self, logits: Tensor, samples: Sequence[RunningSample]) -> PendingSamples:
        scores = logits
        if any(map(self.changes_logits, samples)):
            scores = logits.to(torch.float32, copy=True)
            self.process(scores, samples)
        token_ids = self._sample(scores, samples)
        host_copy = HostCopy(token_ids, wait_for=self._wait_for)
        ks = {i: sample.params.logprobs for i, sample in enumerate(samples)}
        requested = {i: k for i, k in ks.items() if k is not None}
        logprobs = self._logprobs_of(logits, token_ids, requested) if requested else None
        # All memory is allocated by now: a launch that ran out of memory has changed no state and can be repeated.
        self._penalties.count(samples, token_ids)

        def read() -> SamplerOutput:
            (host_ids,) = host_copy.wait()
            ids: list[int] = host_ids.tolist()
            found: list[TokenLogprobs | None] = [None] * len(ids)
            if logprobs is not None:
                for row, entry in zip(requested, logprobs.read([ids[row] for row in requested]), strict=True):
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

    def _sample(self, scores: Tensor, samples: Sequence[RunningSample]) -> Tensor:
        params, device = [sample.params for sample in samples], self._device
        temperatures = [0.0 if p.is_greedy else max(p.temperature, MIN_TEMPERATURE) for p in params]
        seqs = [sample.seq for sample in samples]
        return sample(
            scores,
            to_device(temperatures, torch.float32, device),
            to_device([min(p.top_k, self.vocab_size) for p in params], torch.int32, device),
            to_device([p.top_p for p in params], torch.float64, device),
            to_device([p.min_p for p in params], torch.float64, device),
            to_device([_signed(seq.request.stream_key) for seq in seqs], torch.int64, device),
            to_device([seq.sample for seq in seqs], torch.int32, device),
            to_device([seq.num_generated for seq in seqs], torch.int64, device),
        )


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


def _signed(key: int) -> int:
    """Return the 64 bits of a stream key as an int64 value."""
    return key - 2**64 if key >= 2**63 else key
