import math
import random

import pytest
import torch
from made_samples import make_sample, sample_next

from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import TokenLogprobs
from moray.engine.sampling.running_sample import NO_TOKEN
from moray.engine.sampling.sampler import Sampler, token_logprobs

VOCAB = 500


def make_rows(sampler, all_params, prompt=(1, 2, 3)):
    return [make_sample(sampler, params, prompt, i) for i, params in enumerate(all_params)]


def run(all_params, steps, vocab_size=VOCAB, eos=(0,), prompt=(1, 2, 3)):
    """Return the tokens of each row. steps: logits [num_rows, vocab_size] per step"""
    rows = make_rows(sampler := Sampler(vocab_size, eos), all_params, prompt)
    columns = [sample_next(sampler, logits, rows).token_ids for logits in steps]
    return [list(tokens) for tokens in zip(*columns, strict=True)]


def logits_of(num_rows, vocab_size=VOCAB, seed=0, spread=3.0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


VARIED = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.99),
    SamplingParams(temperature=1.0, top_k=50),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.5, logprobs=3),
    SamplingParams(logit_bias={5: 3.0, 9: -100.0}, logprobs=0),
    SamplingParams(temperature=0.9, min_tokens=4, stop_token_ids=(7, 8), logprobs=20),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [VOCAB, 32064])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype, vocab_size):
    num_rows, num_steps = 64, 3 if vocab_size == VOCAB else 2
    all_params = [VARIED[i % len(VARIED)] for i in range(num_rows)]
    steps = [logits_of(num_rows, vocab_size, seed, spread=1 + seed).to(dtype) for seed in range(num_steps)]

    def run_in_batches(size, order):
        rows = make_rows(sampler := Sampler(vocab_size, [0]), all_params)
        found = {}
        for step, logits in enumerate(steps):
            for start in range(0, num_rows, size):
                members = order[start : start + size]
                output = sample_next(sampler, logits[members], [rows[i] for i in members])
                for i, token_id, logprobs in zip(members, output.token_ids, output.logprobs, strict=True):
                    found[step, i] = token_id, logprobs
        return found

    together = run_in_batches(num_rows, list(range(num_rows)))
    rng = random.Random(0)
    for size in (1, 7, num_rows):
        assert run_in_batches(size, rng.sample(range(num_rows), num_rows)) == together


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(2, VOCAB)
    logits[0, 40] = logits[0, 30] = 1.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert run([SamplingParams()] * 2, [logits.to(dtype)]) == [[30], [0]]


def test_a_stream_is_its_key_sample_and_position():
    sampler = Sampler(VOCAB, [])
    params = SamplingParams(temperature=1.0)
    keys = [(11, 0), (11, 0), (11, 1), (12, 0)]
    rows = [make_sample(sampler, params, [1], key, sample) for key, sample in keys]
    steps = [sample_next(sampler, torch.zeros(4, VOCAB), rows).token_ids for _ in range(8)]
    first, same, other_sample, other_key = zip(*steps, strict=True)
    assert first == same
    assert len({first, other_sample, other_key}) == 3
    assert len(set(first)) > 4  # nor is every position the same


def test_repetition_penalty_falls_on_prompt_and_generated():
    logits = torch.zeros(1, VOCAB)
    logits[0, [1, 20, 21, 22]] = torch.tensor([4.0, 3.0, 2.9, 2.8])  # 1 is in the prompt
    assert run([SamplingParams(repetition_penalty=2.0)], [logits] * 4) == [[20, 21, 22, 1]]


def test_presence_and_frequency_penalties_fall_on_generated_alone():
    logits = torch.zeros(1, VOCAB)
    logits[0, [1, 20]] = torch.tensor([4.0, 3.2])
    assert run([SamplingParams(presence_penalty=1.0)], [logits] * 3) == [[1, 20, 1]]
    assert run([SamplingParams(frequency_penalty=0.5)], [logits] * 6) == [[1, 1, 20, 1, 20, 1]]


def test_logit_bias():
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 5]] = torch.tensor([30.0, 20.0])
    assert run([SamplingParams(logit_bias={4: -100.0})], [logits]) == [[5]]
    assert run([SamplingParams(logit_bias={6: 100.0}, temperature=1.0)], [logits]) == [[6]]
    assert run(
        [SamplingParams(logit_bias={i: -100.0 for i in range(VOCAB) if i != 77}, temperature=1.0)], [logits]
    ) == [[77]]


def test_stop_tokens_are_not_sampled_before_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, [0, 9, 30]] = torch.tensor([3.0, 2.0, 1.0])
    params = SamplingParams(min_tokens=2, stop_token_ids=(9,))
    assert run([params], [logits] * 4, eos=(0,)) == [[30, 30, 0, 0]]
    ignoring = SamplingParams(min_tokens=2, stop_token_ids=(9,), ignore_eos=True)
    assert run([ignoring], [logits] * 2, eos=(0,)) == [[0, 0]]  # it ends nothing, so it may be sampled


def test_all_but_one_token_banned():
    params = SamplingParams(min_tokens=1, stop_token_ids=tuple(i for i in range(VOCAB) if i != 123), temperature=1.0)
    assert run([params, SamplingParams()], [logits_of(2)])[0] == [123]


def test_stop_token_ids_of_a_row():
    sampler = Sampler(VOCAB, [0, 2, VOCAB + 5])
    assert sampler.stop_token_ids(SamplingParams(stop_token_ids=(9,))) == {0, 2, 9}
    assert sampler.stop_token_ids(SamplingParams(stop_token_ids=(9,), ignore_eos=True)) == {9}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={VOCAB: 1.0}),
        SamplingParams(stop_token_ids=(VOCAB + 3,)),
        SamplingParams(min_tokens=1, stop_token_ids=tuple(range(VOCAB))),
    ],
)
def test_parameters_that_the_model_cannot_follow(params):
    with pytest.raises(RequestError) as error:
        Sampler(VOCAB, []).stop_token_ids(params)
    assert error.value.code == "bad_params"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_nan_is_reported_and_the_others_go_on(bad):
    logits = logits_of(len(VARIED))
    fine = run(VARIED, [logits])
    for victim in range(len(VARIED)):
        broken = logits.clone()
        broken[victim, 17] = bad
        rows = make_rows(sampler := Sampler(VOCAB, [0]), VARIED)
        output = sampler.sample(broken, rows)
        assert output.token_ids == [NO_TOKEN if i == victim else fine[i][0] for i in range(len(VARIED))]
        assert output.logprobs[victim] is None


def test_logits_stay_as_they_are():
    logits = logits_of(len(VARIED))
    before = logits.clone()
    run(VARIED, [logits])
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_own():
    logits = logits_of(1)
    params = SamplingParams(temperature=2.0, top_k=3, repetition_penalty=2.0, logit_bias={7: 50.0}, logprobs=4)
    sampler = Sampler(VOCAB, [0])
    output = sampler.sample(logits, [make_sample(sampler, params, [1, 2])])
    assert output.token_ids == [7]
    expected = logits[0].log_softmax(0)
    found = output.logprobs[0]
    assert found.token_id == 7
    assert found.logprob == pytest.approx(expected[7].item())
    best = expected.topk(4)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist())


def test_logprobs_put_the_lowest_id_first_among_equals():
    entry = token_logprobs(torch.zeros(1, VOCAB, dtype=torch.bfloat16), [400], [3])[0]
    assert [token for token, _ in entry.top] == [0, 1, 2]
    assert entry.logprob == pytest.approx(-math.log(VOCAB))


def test_each_row_has_as_many_logprobs_as_it_asked_for():
    sampler = Sampler(VOCAB, [0])
    rows = make_rows(sampler, [SamplingParams(logprobs=k) for k in (None, 0, 5, 20)])
    entries = sampler.sample(logits_of(4), rows).logprobs
    assert [entry and len(entry.top) for entry in entries] == [None, 0, 5, 20]


def test_logprobs_of_given_tokens_do_not_depend_on_the_rows_beside_them():
    logits = logits_of(150).bfloat16()
    ids = [(7 * i) % VOCAB for i in range(150)]
    entries = token_logprobs(logits, ids, [2] * 150)
    assert entries == [token_logprobs(logits[i : i + 1], [ids[i]], [2])[0] for i in range(150)]
    assert isinstance(entries[0], TokenLogprobs)
    assert entries[0].logprob == pytest.approx(logits[0].float().log_softmax(0)[0].item())


def test_the_best_token_is_the_one_that_greedy_sampling_takes():
    """Small logits that differ in the last bit round to the same logprob, but the larger one is still the best."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 1e-3
    logits[0, 9] = torch.tensor(1e-3).nextafter(torch.tensor(1.0))
    sampler = Sampler(VOCAB, [])
    output = sampler.sample(logits, make_rows(sampler, [SamplingParams(logprobs=2)]))
    (entry,) = output.logprobs
    assert output.token_ids == [9] and [i for i, _ in entry.top] == [9, 3]
    assert entry.top[0][1] == entry.top[1][1], "they do round to the same"
