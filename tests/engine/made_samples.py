"""Samples for tests of samplers, without an engine."""

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.engine.sampling.sampler import Sampler, SamplerOutput
from moray.engine.text.grammar import Matcher


class AllowedTokens(Matcher):
    """A grammar that allows the same tokens again and again, for vocabularies without a tokenizer."""

    def __init__(self, allowed: Collection[int]) -> None:
        self.error = None
        self._bits = sum(1 << token for token in allowed)

    def fill(self, words: memoryview) -> None:
        words[:] = self._bits.to_bytes(len(words), "little")

    def accept(self, token_id: int) -> None:
        if not self._bits >> token_id & 1:
            self.error = f"token {token_id} is not allowed"

    def forced_tokens(self) -> SequenceOf[int]:
        return ()

    def ends_after(self, token_ids: SequenceOf[int]) -> bool:
        return False

    @property
    def has_ended(self) -> bool:
        return False


def make_sample(
    sampler: Sampler,
    params: SamplingParams,
    prompt: SequenceOf[int] = (),
    stream_key: int = 0,
    number: int = 0,
    allowed: Collection[int] | None = None,
) -> RunningSample:
    """Return a sample that the sampler has not seen yet.

    number:   its number among the samples of its request
    allowed:  the tokens that its grammar allows; None = it has no grammar
    """
    seq = Sequence(0, Request("r", prompt, params, stream_key), number)
    grammar = None if allowed is None else AllowedTokens(allowed)
    return RunningSample(seq, sampler.stop_token_ids(params), grammar=grammar)


def sample_next(sampler: Sampler, logits: Tensor, samples: SequenceOf[RunningSample]) -> SamplerOutput:
    """Sample the next token of each sample, and append it as the engine does."""
    output = sampler.launch(logits, samples).read()
    for sample, token_id in zip(samples, output.token_ids, strict=True):
        if token_id != NO_TOKEN:
            sample.seq.append(token_id)
    return output
