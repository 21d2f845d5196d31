"""Samples for tests of samplers, without an engine."""

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from moray.engine.core.sequence import Sequence
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.engine.sampling.sampler import Sampler, SamplerOutput


def make_sample(
    sampler: Sampler, params: SamplingParams, prompt: SequenceOf[int] = (), stream_key: int = 0, number: int = 0
) -> RunningSample:
    """Return a sample that the sampler has not seen yet.

    number: its number among the samples of its request
    """
    seq = Sequence(0, Request("r", prompt, params, stream_key), number)
    return RunningSample(seq, sampler.stop_token_ids(params))


def sample_next(sampler: Sampler, logits: Tensor, samples: SequenceOf[RunningSample]) -> SamplerOutput:
    """Sample the next token of each sample, and append it as the engine does."""
    output = sampler.launch(logits, samples).read()
    for sample, token_id in zip(samples, output.token_ids, strict=True):
        if token_id != NO_TOKEN:
            sample.seq.append(token_id)
    return output
