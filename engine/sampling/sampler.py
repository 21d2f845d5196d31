"""Sampler: samples one token for every sample of a step. The Engine calls it with the step's logits.

engine/sampling/logit_processors.py has the order of operations. A row's token and logprobs do not depend, bit by bit,
on the other rows. Logprobs are those of the model: they are computed from the unchanged logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.engine.errors import Problem, RequestError
from moray.engine.params import SamplingParams, find_unknown_tokens
from moray.engine.platform.transfer import to_device
from moray.engine.request import TokenLogprobs
from moray.engine.sampling.logit_processors import Allowed, Penalties, in_order
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.kernels.cpu import sampling
from moray.kernels.cpu.best_tokens import best_tokens
from moray.kernels.cpu.philox import uniform_bits

MIN_TEMPERATURE = 1e-6  # far below the temperatures at which any token but the best can be sampled


@dataclass(frozen=True)
class SamplerOutput:
    """Holds the sampled tokens of a step, one entry per row of logits.

    token_ids: NO_TOKEN if the logits are not finite numbers; the sequence cannot continue
    logprobs:  None if the sample did not ask for logprobs
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class PendingSamples:
    """Holds sampled tokens that may not have arrived on the host yet.

    token_ids:  [num_rows] int64, on the device of the logits; NO_TOKEN as in SamplerOutput
    read:       waits for the tokens and returns them
    """

    token_ids: Tensor
    read: Callable[[], SamplerOutput]


class Sampler:
    """Samples tokens for one model.

    eos_token_ids: tokens that end a completion, unless its params have ignore_eos
    penalties:     those of the device; None = the CPU's
    allowed:       the grammars' masks of the device; None = the CPU's
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        penalties: Penalties | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(i for i in eos_token_ids if i < vocab_size)
        self._penalties = penalties or Penalties(vocab_size)
        self.processors = in_order(self._penalties, allowed or Allowed())

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Return the tokens that end a sample: params.stop_token_ids and, unless ignore_eos, the model's.

        Raises RequestError("bad_params") for token ids that the model does not have, and for min_tokens if every token
        is a stop token.
        """
        if problems := list(find_unknown_tokens(vars(params), self.vocab_size)):
            raise RequestError.bad_params(problems)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if params.min_tokens > 0 and len(stops) == self.vocab_size:
            message = "every token is one, so min_tokens leaves none to sample"
            raise RequestError.bad_params([Problem("stop_token_ids", message)])
        return stops

    def launch(self, logits: Tensor, samples: Sequence[RunningSample]) -> PendingSamples:
        """Start sampling the next token of every sample.

        This sampler does it at once; the one of engine/backends/cuda/ does not wait for the device.

        logits: [len(samples), vocab_size], any floating dtype; not changed
        """
        token_ids, output = self._sample(logits, samples)
        return PendingSamples(token_ids, lambda: output)

    def launch_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], ks: Sequence[int]
    ) -> Callable[[], list[TokenLogprobs]]:
        """Start computing what token_logprobs returns, and return a function that waits for it.

        This sampler does it at once; the one of engine/backends/cuda/ does not wait for the device.

        logits: [len(token_ids), vocab_size]
        """
        entries = token_logprobs(logits, token_ids, ks)
        return lambda: entries

    def release(self, sample: RunningSample) -> None:
        """Free the resources of a sample that has ended."""
        self._penalties.release(sample)

    def changes_logits(self, sample: RunningSample) -> bool:
        """Return whether the sample's logits change before its next token is chosen."""
        return any(processor.applies_to(sample) for processor in self.processors)

    def process(self, logits: Tensor, samples: Sequence[RunningSample]) -> None:
        """Apply the logit processors in order, in place.

        logits: [len(samples), vocab_size] fp32, contiguous
        """
        for processor in self.processors:
            if rows := [row for row, sample in enumerate(samples) if processor.applies_to(sample)]:
                processor.apply(logits, samples, rows)

    def sample(self, logits: Tensor, samples: Sequence[RunningSample]) -> SamplerOutput:
        """Sample the next token of every sample.

        logits: [len(samples), vocab_size], any floating dtype; not changed
        """
        return self._sample(logits, samples)[1]

    def _sample(self, logits: Tensor, samples: Sequence[RunningSample]) -> tuple[Tensor, SamplerOutput]:
        """Return the tokens, [len(samples)] int64, and what `sample` returns."""
        tokens = best_tokens(logits)
        token_ids = tokens.tolist()
        not_plain_greedy = [
            i
            for i, sample in enumerate(samples)
            if token_ids[i] != NO_TOKEN and (not sample.params.is_greedy or self.changes_logits(sample))
        ]
        if not_plain_greedy:
            chosen = self._choose(_copy_rows(logits, not_plain_greedy).float(), [samples[i] for i in not_plain_greedy])
            for i, token_id in zip(not_plain_greedy, chosen, strict=True):
                token_ids[i] = token_id
            tokens = torch.tensor(token_ids)
        logprobs = self._logprobs(logits, samples, token_ids)
        self._penalties.count(samples, tokens)
        return tokens, SamplerOutput(token_ids, logprobs)

    def _choose(self, logits: Tensor, samples: list[RunningSample]) -> list[int]:
        """Sample the tokens of rows that need more than an argmax. logits: fp32, overwritten"""
        token_ids = [0] * len(samples)
        if any(map(self.changes_logits, samples)):
            self.process(logits, samples)
            token_ids = best_tokens(logits).tolist()
        random = [i for i, sample in enumerate(samples) if token_ids[i] != NO_TOKEN and not sample.params.is_greedy]
        if random:
            params, device = [samples[i].params for i in random], logits.device
            seqs = [samples[i].seq for i in random]
            chosen = sampling.sample(
                logits if len(random) == len(samples) else _copy_rows(logits, random),
                to_device([max(p.temperature, MIN_TEMPERATURE) for p in params], torch.float32, device),
                to_device([min(p.top_k, self.vocab_size) for p in params], torch.int64, device),
                to_device([p.top_p for p in params], torch.float64, device),
                to_device([p.min_p for p in params], torch.float64, device),
                [uniform_bits(seq.request.stream_key, seq.sample, seq.num_generated) for seq in seqs],
            )
            for i, token_id in zip(random, chosen.tolist(), strict=True):
                token_ids[i] = token_id
        return token_ids

    def _logprobs(
        self, logits: Tensor, samples: Sequence[RunningSample], token_ids: list[int]
    ) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(samples)
        requested = {i: sample.params.logprobs for i, sample in enumerate(samples) if token_ids[i] != NO_TOKEN}
        ks = {i: k for i, k in requested.items() if k is not None}
        if ks:
            index = list(ks)
            entries = token_logprobs(_copy_rows(logits, index), [token_ids[i] for i in index], list(ks.values()))
            for i, entry in zip(index, entries, strict=True):
                found[i] = entry
        return found


def token_logprobs(logits: Tensor, token_ids: Sequence[int], ks: Sequence[int]) -> list[TokenLogprobs]:
    """Return the logprobs of one token per row under softmax(logits), with those of the row's k best tokens.

    logits:     [num_rows, vocab_size]
    token_ids:  one token per row
    ks:         number of best tokens per row
    """
    logits = logits.float()
    logprobs = logits.log_softmax(1)
    ids = to_device(token_ids, torch.int64, logits.device)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    _, best_ids = sampling.top_tokens(logits, max(ks))  # by logits: rounding can give different logits the same logprob
    best = logprobs.gather(1, best_ids)
    table = zip(token_ids, chosen, ks, best_ids.tolist(), best.tolist(), strict=True)
    return [TokenLogprobs(t, p, tuple(zip(top_ids[:k], top[:k], strict=True))) for t, p, k, top_ids, top in table]


def _copy_rows(logits: Tensor, index: list[int]) -> Tensor:
    """Return a copy of the rows at `index`, which are ascending."""
    return logits.clone() if len(index) == len(logits) else logits[torch.tensor(index, device=logits.device)]
