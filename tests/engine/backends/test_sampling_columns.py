"""Tests that what CudaSampler keeps on the device from step to step is what it would make anew."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from made_samples import make_sample

from moray.engine.backends.cuda.sampler import CudaSampler
from moray.engine.backends.cuda.sampling_columns import SamplingColumns, pack_row
from moray.engine.params import SamplingParams
from moray.engine.sampling.running_sample import RunningSample

VOCAB, CPU = 50, torch.device("cpu")


def sample_of(sampler: CudaSampler, number: int, *, jumps: bool) -> RunningSample:
    params = SamplingParams(temperature=1 + number / 8, top_k=number, top_p=0.5 + number / 64, min_p=number / 64)
    sample = make_sample(sampler, params, list(range(1 + number)), 2**63 + number, number % 3)
    sample.jumps = jumps
    return sample


def made_anew(samples: list[RunningSample]) -> list[list[float]]:
    rows = [pack_row(s.seq, s.params.temperature, s.params.top_k) for s in samples]
    return as_lists(SamplingColumns(rows, samples, CPU), len(samples))


def as_lists(columns: SamplingColumns, num_rows: int) -> list[list[float]]:
    return [column[:num_rows].tolist() for column in columns.of_step()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kept_columns_are_those_made_anew(data: st.DataObject) -> None:
    """Samples begin, pause, get tokens that are read at once or a step late, jump, fail to be launched, and end."""
    sampler = CudaSampler(VOCAB, [0], CPU)
    samples: list[RunningSample] = []
    unread: list[RunningSample] = []
    for number in range(data.draw(st.integers(1, 20))):
        if not samples or data.draw(st.integers(0, 3)) == 0:
            samples.append(sample_of(sampler, number, jumps=data.draw(st.booleans())))
        # Most steps have the samples of the last one.
        ready = [s for s in samples if data.draw(st.integers(0, 9))]
        if not ready:
            continue
        _, columns = sampler._batch_of(ready)
        assert as_lists(columns, len(ready)) == made_anew(ready)
        if data.draw(st.integers(0, 5)) == 0:
            continue  # it ran out of memory
        columns.count()
        for sample in unread:
            sample.seq.append(7)
            if sample.jumps and data.draw(st.booleans()):
                sample.seq.append(8, is_forced=True)
        ended = [s for s in unread if data.draw(st.integers(0, 9)) == 0]
        for sample in ended:
            sampler.release(sample)
            samples.remove(sample)
        unread = [s for s in ready if s not in ended]
        for row, sample in enumerate(ready):
            if sample in unread:
                sample.seq.await_token(row)
