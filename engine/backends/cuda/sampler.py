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
        logprobs = _Logprobs.of(logits, samples, token_ids, self._wait_for)
        # All memory is allocated by now: a launch that ran out of memory has changed no state and can be repeated.
        self._penalties.count(samples, token_ids)

        def read() -> SamplerOutput:
            (host_ids,) = host_copy.wait()
            ids: list[int] = host_ids.tolist()
            return SamplerOutput(ids, [None] * len(ids) if logprobs is None else logprobs.read(ids))

        return PendingSamples(token_ids, read)

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
    """Computes the logprobs of the samples that asked for them, and copies them to the host.

    The sort is stable, so that tokens with equal logits are in order of their ids, as on the CPU.
    """

    def __init__(
        self,
        logits: Tensor,
        token_ids: Tensor,
        ks: dict[int, int],
        wait_for: Callable[[torch.cuda.Event], None],
    ) -> None:
        index = to_device(list(ks), torch.int64, logits.device)
        scores = logits[index].float()
        logprobs = scores.log_softmax(1)
        chosen = logprobs.gather(1, token_ids[index].clamp(min=0)[:, None])
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : max(ks.values())]
        self._ks = ks
        self._host_copy = HostCopy(chosen, logprobs.gather(1, best), best, wait_for=wait_for)

    @classmethod
    def of(
        cls,
        logits: Tensor,
        samples: Sequence[RunningSample],
        token_ids: Tensor,
        wait_for: Callable[[torch.cuda.Event], None],
    ) -> "_Logprobs | None":
        ks = {i: sample.params.logprobs for i, sample in enumerate(samples)}
        requested = {i: k for i, k in ks.items() if k is not None}
        return cls(logits, token_ids, requested, wait_for) if requested else None

    def read(self, token_ids: list[int]) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(token_ids)
        chosen, values, ids = (tensor.tolist() for tensor in self._host_copy.wait())
        for (row, k), (logprob,), top, top_ids in zip(self._ks.items(), chosen, values, ids, strict=True):
            if token_ids[row] != NO_TOKEN:
                found[row] = TokenLogprobs(token_ids[row], logprob, tuple(zip(top_ids[:k], top[:k], strict=True)))
        return found


def _signed(key: int) -> int:
    """Return the 64 bits of a stream key as an int64 value."""
    return key - 2**64 if key >= 2**63 else key
