"""DeviceSampler gives what Sampler gives: tokens, logprobs, and the memory of what was seen."""

import math

import pytest
import torch
from triton_device import DEVICE

from engine.device_sampler import LEAST_SLOTS, DeviceSampler
from engine.params import SamplingParams
from engine.sampler import NO_TOKEN, Sampler

VOCAB = 500
PROMPT = (1, 2, 3, 2)
VARIED = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1e-9),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=10_000),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.5, logprobs=3),
    SamplingParams(logit_bias={5: 3.0, 9: -100.0}, logprobs=0),
    SamplingParams(temperature=0.9, min_tokens=4, stop_token_ids=(7, 8), logprobs=20),
]


def sampler_on_device() -> DeviceSampler:
    return DeviceSampler(VOCAB, [0], torch.device(DEVICE))


def logits_of(num_rows: int, seed: int) -> torch.Tensor:
    # bf16 numbers, so that there are equals among them
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return logits.bfloat16()


def test_the_same_as_on_the_cpu() -> None:
    cpu, device = Sampler(VOCAB, [0]), sampler_on_device()
    rows = [[s.new_row(params, PROMPT, 2**64 - 1 - i, i % 3) for i, params in enumerate(VARIED)] for s in (cpu, device)]
    for step in range(6):
        logits = logits_of(len(VARIED), step)
        members = list(range(step % 3, len(VARIED)))  # not all rows take part in each step
        want = cpu.sample(logits[members], [rows[0][i] for i in members])
        launched = device.launch(logits[members].to(DEVICE), [rows[1][i] for i in members])
        got = launched.read()
        assert got.token_ids == want.token_ids == launched.token_ids.tolist()
        for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert (ours.token_id, [t for t, _ in ours.top]) == (theirs.token_id, [t for t, _ in theirs.top])
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
                assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)


def test_a_step_may_be_launched_before_the_last_one_is_read() -> None:
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, repetition_penalty=1.5)
    cpu, device = Sampler(VOCAB, [0]), sampler_on_device()
    ours, theirs = device.new_row(params, PROMPT, 5), cpu.new_row(params, PROMPT, 5)
    logits = logits_of(1, 1)
    launched = [device.launch(logits.to(DEVICE), [ours]) for _ in range(8)]
    assert [step.read().token_ids for step in launched] == [cpu.sample(logits, [theirs]).token_ids for _ in range(8)]


def test_slots_are_given_back_and_start_empty() -> None:
    params = SamplingParams(frequency_penalty=2.0)
    device, logits = sampler_on_device(), logits_of(1, 0).to(DEVICE)
    first = device.launch(logits, [device.new_row(params, PROMPT)]).read().token_ids
    for _ in range(3 * LEAST_SLOTS):
        row = device.new_row(params, PROMPT)
        assert device.launch(logits, [row]).read().token_ids == first, "nothing is left of the row before"
        assert device.launch(logits, [row]).read().token_ids != first
        device.forget(row)
    device.forget(row)
    assert len(device._seen_table) == LEAST_SLOTS
    rows = [device.new_row(params, PROMPT) for _ in range(2 * LEAST_SLOTS)]
    assert device.launch(logits.repeat(len(rows), 1), rows).read().token_ids == first * len(rows)
    assert device.launch(logits.repeat(len(rows), 1), rows).read().token_ids != first * len(rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_leaves_the_others_alone(bad: float) -> None:
    logits = logits_of(len(VARIED), 0)
    fine = Sampler(VOCAB, [0])
    want = fine.sample(logits, [fine.new_row(params, PROMPT, i) for i, params in enumerate(VARIED)]).token_ids
    for victim in range(len(VARIED)):
        broken, device = logits.clone(), sampler_on_device()
        broken[victim, 17] = bad
        rows = [device.new_row(params, PROMPT, i) for i, params in enumerate(VARIED)]
        output = device.launch(broken.to(DEVICE), rows).read()
        assert output.token_ids == [NO_TOKEN if i == victim else token for i, token in enumerate(want)]
        assert output.logprobs[victim] is None
