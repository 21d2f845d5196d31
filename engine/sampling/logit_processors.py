"""LogitProcessors: what happens to a sample's logits before its token is chosen, and the order of all steps.

Every sampler takes these steps, in this order:

    logit_bias, penalties, min_tokens,   logit processors, one class each; in_order() lists them
    structured
    temperature, top_k, top_p, min_p     one kernel for each device, in kernels/cpu/sampling.py and
    random choice                        kernels/gpu/sampling.py, because their sums must be exact in any order

A row's token does not depend, bit by bit, on the other rows.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moray.engine.platform.transfer import to_device
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.engine.text.grammar import WORD_BYTES, words_of
from moray.kernels.cpu import sampling
from moray.kernels.cpu.allowed import keep_allowed


class LogitProcessor(ABC):
    """Changes the logits of some samples, as their parameters say: one step of sampling."""

    def may_apply_to(self, sample: RunningSample) -> bool:
        """Return whether it changes the logits of any of the sample's tokens; asked once, not for each token."""
        return self.applies_to(sample)

    @abstractmethod
    def applies_to(self, sample: RunningSample) -> bool:
        """Return whether it changes the logits of the sample's next token."""

    @abstractmethod
    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        """Change the logits of some samples, in place, without waiting for the device.

        logits:  [len(samples), vocab_size] fp32, contiguous
        rows:    the rows of the samples that it applies to
        """


class LogitBias(LogitProcessor):
    """Adds logit_bias."""

    def applies_to(self, sample: RunningSample) -> bool:
        return bool(sample.params.logit_bias)

    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        biased = [(row, token_id, bias) for row in rows for token_id, bias in samples[row].params.logit_bias.items()]
        at, token_ids, bias = zip(*biased, strict=True)
        logits[_index(at, token_ids, logits.device)] += to_device(bias, torch.float32, logits.device)


class Penalties(LogitProcessor):
    """Applies repetition_penalty, frequency_penalty and presence_penalty to the tokens that a sample has seen."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._seen: dict[RunningSample, SeenTokens] = {}

    def applies_to(self, sample: RunningSample) -> bool:
        params = sample.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        seen, device = [self._seen_tokens(samples[row]) for row in rows], logits.device
        lengths = torch.tensor([len(tokens.ids) for tokens in seen])
        params = [sample.params for sample in samples]
        sampling.penalize(
            logits,
            torch.tensor(rows).repeat_interleave(lengths).to(device),
            torch.cat([tokens.ids for tokens in seen]).to(device),
            torch.cat([tokens.counts for tokens in seen]).to(device),
            to_device([p.repetition_penalty for p in params], torch.float32, device),
            to_device([p.presence_penalty for p in params], torch.float32, device),
            to_device([p.frequency_penalty for p in params], torch.float32, device),
        )

    def count(self, samples: Sequence[RunningSample], token_ids: Tensor) -> None:
        """Count the tokens that were sampled after apply().

        token_ids: [len(samples)] int64, on the device of the logits; NO_TOKEN where none was sampled
        """
        for sample, token_id in zip(samples, token_ids.tolist(), strict=True):
            if token_id != NO_TOKEN and self.applies_to(sample):
                self._seen_tokens(sample).append(token_id)

    def release(self, sample: RunningSample) -> None:
        """Forget the tokens of a sample that has ended."""
        self._seen.pop(sample, None)

    def _seen_tokens(self, sample: RunningSample) -> "SeenTokens":
        if sample not in self._seen:
            prompt = penalized_prompt(sample)
            num_tokens = len(set(prompt)) + sample.params.max_tokens
            self._seen[sample] = SeenTokens(prompt, min(self._vocab_size, num_tokens))
        return self._seen[sample]


class SeenTokens:
    """Counts the tokens that a sample's penalties apply to.

    max_tokens: upper bound of the number of different tokens
    """

    def __init__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._ids = torch.zeros(max_tokens, dtype=torch.int64)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)
        self._counts = torch.zeros(max_tokens, dtype=torch.float32)

    @property
    def ids(self) -> Tensor:
        """Return the different tokens seen, [num_seen] int64."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        """Return how often each token of `ids` was generated, [num_seen] fp32; 0 if it is only in the prompt."""
        return self._counts[: len(self._slots)]

    def append(self, token_id: int) -> None:
        """Count a generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        self._ids[slot] = token_id
        self._counts[slot] += 1


class MinTokens(LogitProcessor):
    """Bans the stop tokens of samples that have fewer than min_tokens tokens."""

    def may_apply_to(self, sample: RunningSample) -> bool:
        return sample.params.min_tokens > 0

    def applies_to(self, sample: RunningSample) -> bool:
        return sample.must_go_on and bool(sample.stop_token_ids)

    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        at, token_ids = zip(*[(row, token_id) for row in rows for token_id in samples[row].stop_token_ids], strict=True)
        # Assigning the number itself would copy it from the host, and so wait for all work launched on the GPU.
        logits.index_put_(_index(at, token_ids, logits.device), to_device([-torch.inf], torch.float32, logits.device))


class Allowed(LogitProcessor):
    """Forbids the tokens with which a completion would not obey its grammar.

    The host fills a mask for each sample, from the tokens that it has read so far, and copies all of them at once.

    keep_allowed: the device's kernel, see kernels/cpu/allowed.py
    """

    def __init__(self, keep_allowed: Callable[[Tensor, Tensor, Tensor], None] = keep_allowed) -> None:
        self._keep_allowed = keep_allowed

    def applies_to(self, sample: RunningSample) -> bool:
        return sample.grammar is not None

    def apply(self, logits: Tensor, samples: Sequence[RunningSample], rows: Sequence[int]) -> None:
        device, num_words = logits.device, words_of(logits.shape[1])
        masks = array("i", bytes(len(rows) * num_words * WORD_BYTES))
        view = memoryview(masks).cast("B")
        for i, row in enumerate(rows):
            samples[row].fill_mask(view[i * num_words * WORD_BYTES : (i + 1) * num_words * WORD_BYTES])
        view.release()
        on_device = to_device(masks, torch.int32, device).view(len(rows), num_words)
        self._keep_allowed(logits, on_device, to_device(rows, torch.int32, device))


def in_order(penalties: Penalties, allowed: Allowed) -> tuple[LogitProcessor, ...]:
    """Return the logit processors in the order in which they are applied.

    penalties, allowed: those of the device; the other processors are the same on all devices
    """
    return (LogitBias(), penalties, MinTokens(), allowed)


def penalized_prompt(sample: RunningSample) -> Sequence[int]:
    """Return the prompt's tokens if penalties apply to them: repetition_penalty does, the others do not."""
    seq = sample.seq
    return () if sample.params.repetition_penalty == 1.0 else seq.token_ids[: seq.num_prompt_tokens]


def _index(rows: Sequence[int], token_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return to_device(rows, torch.int64, device), to_device(token_ids, torch.int64, device)
