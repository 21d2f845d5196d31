"""Tests that CudaSampler gives the results of Sampler: tokens, logprobs and counts of seen tokens."""

import math
from typing import Any

import pytest
import torch
from made_samples import make_sample, sample_next
from step_order import CASES, ORDER, Case, sampled_tokens, tokens_left
from step_order import VOCAB as SMALL_VOCAB
from triton_device import DEVICE

from moray.engine.backends.cuda import penalties as cuda_penalties
from moray.engine.backends.cuda import sampler as cuda_sampler
from moray.engine.backends.cuda import sampling_columns
from moray.engine.backends.cuda.penalties import MIN_SLOTS, CudaPenalties
from moray.engine.backends.cuda.sampler import CudaSampler
from moray.engine.params import SamplingParams
from moray.engine.platform.transfer import to_device
from moray.engine.sampling import logit_processors
from moray.engine.sampling.running_sample import NO_TOKEN, RunningSample
from moray.engine.sampling.sampler import Sampler, SamplerOutput

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


def sampler_on_device() -> CudaSampler:
    return CudaSampler(VOCAB, [0], torch.device(DEVICE))


def logits_of(num_rows: int, seed: int) -> torch.Tensor:
    # numbers in bf16, so that some are equal
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return logits.bfloat16()


def test_the_same_as_on_the_cpu() -> None:
    cpu, device = Sampler(VOCAB, [0]), sampler_on_device()
    rows = [
        [make_sample(s, params, PROMPT, 2**64 - 1 - i, i % 3) for i, params in enumerate(VARIED)] for s in (cpu, device)
    ]
    for step in range(4):
        logits = logits_of(len(VARIED), step)
        members = list(range(step % 3, len(VARIED)))  # not all rows take part in each step
        want = sample_next(cpu, logits[members], [rows[0][i] for i in members])
        launched = device.launch(logits[members].to(DEVICE), [rows[1][i] for i in members])
        got = launched.read()
        for i, token_id in zip(members, got.token_ids, strict=True):
            rows[1][i].seq.append(token_id)
        assert got.token_ids == want.token_ids == launched.token_ids.tolist()
        for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert (ours.token_id, [t for t, _ in ours.top]) == (theirs.token_id, [t for t, _ in theirs.top])
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
                assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)


def test_logprobs_of_prompts_are_those_of_the_cpu() -> None:
    logits, token_ids, ks = logits_of(5, 2), [3, 499, 0, 17, 250], [0, 3, 20, 1, 5]
    want = Sampler(VOCAB, [0]).launch_logprobs(logits, token_ids, ks)()
    found = sampler_on_device().launch_logprobs(logits.to(DEVICE), token_ids, ks)()
    for ours, theirs in zip(found, want, strict=True):
        assert (ours.token_id, [t for t, _ in ours.top]) == (theirs.token_id, [t for t, _ in theirs.top])
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-5)


def test_grammars_allow_the_same_as_on_the_cpu() -> None:
    """Half of the rows have a grammar: of one token, of some, of most, and of none, which is an error."""
    allowed = [None, {17}, set(range(100, 131)), set(range(VOCAB)) - {3, 64, 499}, set(), None, {0, 31, 32, 499}]
    params = [VARIED[i % 6] for i in range(len(allowed))]
    tokens = []
    for sampler, device in ((Sampler(VOCAB, [0]), "cpu"), (sampler_on_device(), DEVICE)):
        rows = [
            make_sample(sampler, one, PROMPT, i, allowed=may)
            for i, (one, may) in enumerate(zip(params, allowed, strict=True))
        ]
        tokens.append(
            [sample_next(sampler, logits_of(len(rows), step).to(device), rows).token_ids for step in range(4)]
        )
    assert tokens[0] == tokens[1]
    for step in tokens[0]:
        for token_id, may in zip(step, allowed, strict=True):
            assert token_id == NO_TOKEN if may == set() else may is None or token_id in may


def test_a_step_may_be_launched_before_the_last_one_is_read() -> None:
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, repetition_penalty=1.5)
    cpu, device = Sampler(VOCAB, [0]), sampler_on_device()
    ours, theirs = make_sample(device, params, PROMPT, 5), make_sample(cpu, params, PROMPT, 5)
    logits = logits_of(1, 1)
    launched = []
    for _ in range(8):
        launched.append(device.launch(logits.to(DEVICE), [ours]))
        ours.seq.append(NO_TOKEN)  # in place of the token, which the host does not know yet
    want = [sample_next(cpu, logits, [theirs]).token_ids for _ in range(8)]
    assert [step.read().token_ids for step in launched] == want


def test_slots_are_given_back_and_start_empty() -> None:
    params = SamplingParams(frequency_penalty=2.0)
    device, logits = sampler_on_device(), logits_of(1, 0).to(DEVICE)
    first = device.launch(logits, [make_sample(device, params, PROMPT)]).read().token_ids
    for _ in range(3 * MIN_SLOTS):
        row = make_sample(device, params, PROMPT)
        assert device.launch(logits, [row]).read().token_ids == first, "nothing is left of the previous row"
        assert device.launch(logits, [row]).read().token_ids != first
        device.release(row)
    device.release(row)
    assert isinstance(device._penalties, CudaPenalties) and len(device._penalties._seen_table) == MIN_SLOTS
    rows = [make_sample(device, params, PROMPT) for _ in range(2 * MIN_SLOTS)]
    assert device.launch(logits.repeat(len(rows), 1), rows).read().token_ids == first * len(rows)
    assert device.launch(logits.repeat(len(rows), 1), rows).read().token_ids != first * len(rows)


def test_a_launch_that_runs_out_of_memory_changes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    failing = -1

    def sometimes(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) - 1 == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return to_device(*args)

    for module in (cuda_sampler, cuda_penalties, logit_processors, sampling_columns):
        monkeypatch.setattr(module, "to_device", sometimes)
    params = [VARIED[4], SamplingParams(repetition_penalty=9.0), SamplingParams(temperature=1.0, logprobs=3)]
    logits = logits_of(len(params), 0).to(DEVICE)

    def launch(device: CudaSampler, rows: list[RunningSample]) -> SamplerOutput:
        return sample_next(device, logits, rows)

    def start() -> tuple[CudaSampler, list[RunningSample]]:
        device = sampler_on_device()
        return device, [make_sample(device, one, PROMPT, i) for i, one in enumerate(params)]

    undisturbed = start()
    want = [launch(*undisturbed)]
    num_calls = len(calls)
    want.append(launch(*undisturbed))
    for failing in range(num_calls):
        calls.clear()
        disturbed = start()
        with pytest.raises(torch.OutOfMemoryError):
            launch(*disturbed)
        assert [launch(*disturbed) for _ in range(2)] == want, failing


@pytest.mark.parametrize("bad", [pytest.param(math.nan, marks=pytest.mark.slow), math.inf])
def test_a_row_that_is_not_numbers_leaves_the_others_alone(bad: float) -> None:
    logits = logits_of(len(VARIED), 0)
    fine = Sampler(VOCAB, [0])
    want = fine.sample(logits, [make_sample(fine, params, PROMPT, i) for i, params in enumerate(VARIED)]).token_ids
    for victim in (0, 4, 7, 9):  # greedy, filtered, with penalties, with logprobs
        broken, device = logits.clone(), sampler_on_device()
        broken[victim, 17] = bad
        rows = [make_sample(device, params, PROMPT, i) for i, params in enumerate(VARIED)]
        output = device.launch(broken.to(DEVICE), rows).read()
        assert output.token_ids == [NO_TOKEN if i == victim else token for i, token in enumerate(want)]
        assert output.logprobs[victim] is None


def test_the_processors_of_both_devices_are_in_one_order() -> None:
    names = [type(processor).__name__.replace("Cuda", "") for processor in sampler_on_device().processors]
    assert names == [type(processor).__name__ for processor in Sampler(VOCAB, []).processors]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.first}, {case.second}")
def test_the_steps_are_taken_in_the_documented_order(case: Case) -> None:
    sampler = CudaSampler(SMALL_VOCAB, [], torch.device(DEVICE))
    assert sampled_tokens(sampler, case, DEVICE) == tokens_left(case, ORDER)
