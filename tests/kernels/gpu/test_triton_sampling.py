"""Tests of the sampling kernel and the penalties against their references and the CPU's sampling."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from moray.kernels.cpu import sampling as cpu_sampling
from moray.kernels.cpu.philox import uniform_bits
from moray.kernels.gpu import sampling
from moray.kernels.gpu.penalties import count_tokens, count_tokens_ref, penalize, penalize_ref
from moray.kernels.gpu.sampling import sample, sample_ref

Params = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
PARAMS: list[Params] = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.0),  # greedy, whatever the filters
    (0.7, 0, 0.9, 0.0),
    (1.0, 10, 1.0, 0.0),
    (1.0, 3, 0.6, 0.0),
    (3.0, 64, 0.999999, 0.01),
    (10.0, 0, 1.0, 0.3),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-300, 0.0),
    (0.5, 10_000, 0.5, 1.0),
    (1e-6, 0, 1.0, 0.0),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a row take several blocks."""
    monkeypatch.setattr(sampling, "MAX_BLOCK", 64)


def columns(params: list[Params], keys: list[int], samples: list[int], positions: list[int]) -> list[Tensor]:
    dtypes = [torch.float32, torch.int32, torch.float64, torch.float64, torch.int64, torch.int32, torch.int64]
    values: list[Any] = [*zip(*params, strict=True), keys, samples, positions]
    return [torch.tensor(column, dtype=dtype, device=DEVICE) for column, dtype in zip(values, dtypes, strict=True)]


def drawn(logits: Tensor, params: Params, num_draws: int) -> list[int]:
    """Return the tokens sampled for one row at successive positions."""
    positions = list(range(num_draws))
    rows = logits.to(DEVICE).expand(num_draws, -1).contiguous()
    return sample(rows, *columns([params] * num_draws, [5] * num_draws, [0] * num_draws, positions)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "spread", "num_levels"), [(1, 1.0, 1), (5, 1.0, 2), (64, 0.1, None), (300, 5.0, None), (193, 2.0, 3)]
)
def test_draws_what_the_reference_and_the_cpu_draw(
    vocab_size: int, spread: float, num_levels: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    rng = random.Random(vocab_size)
    logits = torch.randn(len(PARAMS), vocab_size, generator=generator) * spread
    if num_levels is not None:  # ties
        logits = (logits * num_levels).round() / num_levels
    logits[:, torch.randperm(vocab_size, generator=generator)[: vocab_size // 4]] = -torch.inf
    logits = logits.to(DEVICE, dtype)
    keys = [rng.getrandbits(63) for _ in PARAMS]
    samples = [rng.randrange(3) for _ in PARAMS]
    positions = [rng.randrange(1000) for _ in PARAMS]
    given = columns(PARAMS, keys, samples, positions)
    token_ids = sample(logits, *given)
    assert token_ids.tolist() == sample_ref(logits, *given).tolist()

    rows = [i for i, params in enumerate(PARAMS) if params[0] > 0]
    bits = [uniform_bits(keys[i], samples[i], positions[i]) for i in rows]
    temperature, top_k, top_p, min_p = (column[rows].cpu() for column in given[:4])
    expected = cpu_sampling.sample(logits[rows].float().cpu(), temperature, top_k.long(), top_p, min_p, bits)
    assert token_ids[rows].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ((1.0, 3, 1.0, 0.0), {1, 2, 3}),  # of four equals the lowest ids
        ((1.0, 99, 1.0, 0.0), {0, 1, 2, 3, 4, 5}),  # top_k beyond the vocabulary
        ((1.0, 0, 1e-9, 0.0), {1}),  # top_p always keeps one
        ((1.0, 0, 0.25, 0.0), {1, 2}),  # 0.2 of the mass is in each of the four
        ((1.0, 0, 1.0, 1.0), {1, 2, 3, 4}),  # min_p 1 keeps the best ones
        ((1.0, 2, 0.5, 0.0), {1}),  # top_p is a share of what top_k kept
        ((0.0, 0, 1.0, 0.0), {1}),
    ],
)
def test_filters(params: Params, kept: set[int]) -> None:
    logits = torch.tensor([0.2, 1.0, 1.0, 1.0, 1.0, 0.2])
    assert set(drawn(logits, params, 40)) == kept


def test_a_vocabulary_of_equals_is_cut_by_id() -> None:
    logits = torch.zeros(200)
    bits = [uniform_bits(5, 0, position) for position in range(6)]
    assert drawn(logits, (1.0, 0, 0.5, 0.0), 6) == [b * 100 >> 64 for b in bits]
    assert drawn(logits, (1.0, 130, 1.0, 0.0), 6) == [b * 130 >> 64 for b in bits]
    assert drawn(logits, (1.0, 130, 0.5, 0.0), 6) == [b * 65 >> 64 for b in bits]


def test_greedy_takes_the_first_of_equals_wherever_they_stand() -> None:
    for first, second in itertools.combinations([0, 3, 67, 130, 199], 2):
        logits = torch.zeros(200)
        logits[[first, second]] = 2.0
        assert drawn(logits, (0.0, 0, 1.0, 0.0), 1) == [first]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token(temperature: float) -> None:
    logits = torch.zeros(7, 100)
    logits[1, 99] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4, 0] = torch.nan
    logits[4, 1] = torch.inf
    logits[5, :] = torch.nan
    params = [(temperature, 0, 1.0, 0.0)] * 7
    given = columns(params, [0] * 7, [0] * 7, [0, 0, 0, 0, 0, 0, -1])  # the last one is padding
    token_ids = sample(logits.to(DEVICE), *given).tolist()
    assert token_ids[0] >= 0
    assert token_ids[1:] == [-1] * 6
    assert token_ids == sample_ref(logits.to(DEVICE), *given).tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(len(PARAMS), 150, generator=generator) * 3).to(DEVICE)
    given = columns(PARAMS, list(range(len(PARAMS))), [0] * len(PARAMS), [9] * len(PARAMS))
    together = sample(logits, *given)
    order = torch.randperm(len(PARAMS), generator=generator).to(DEVICE)
    assert torch.equal(sample(logits[order], *(column[order] for column in given)), together[order])
    for row in range(len(PARAMS)):
        alone = sample(logits[row : row + 1], *(column[row : row + 1] for column in given))
        assert torch.equal(alone, together[row : row + 1])


def test_penalties_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 3000, generator=generator) * 5).to(DEVICE)
    seen = torch.randint(-6, 6, (3, 3000), generator=generator, dtype=torch.int32).clamp(min=0).to(DEVICE)
    slots = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=DEVICE)
    repetition = torch.tensor([1.3, 2.0, 1.0, 0.7], device=DEVICE)
    presence = torch.tensor([0.3, 1.0, -0.2, 0.0], device=DEVICE)
    frequency = torch.tensor([0.11, 1.0, 0.0, 1.7], device=DEVICE)
    expected, of_cpu, untouched = logits.clone(), logits.cpu().clone(), logits[1].clone()
    penalize_ref(expected, seen, slots, repetition, presence, frequency)

    at = [(row, token) for row in (0, 2, 3) for token in seen[slots[row]].nonzero().flatten().tolist()]
    rows, token_ids = (torch.tensor(part) for part in zip(*at, strict=True))
    counts = (seen.cpu()[slots.cpu().long()][rows, token_ids] - 1).float()
    cpu_sampling.penalize(of_cpu, rows, token_ids, counts, repetition.cpu(), presence.cpu(), frequency.cpu())

    penalize(logits, seen, slots, repetition, presence, frequency)
    assert torch.equal(logits, expected)
    assert torch.equal(logits.cpu(), of_cpu)
    assert torch.equal(logits[1], untouched)


def test_tokens_are_recorded() -> None:
    seen = torch.tensor([[0, 1, 4], [0, 0, 0], [7, 7, 7]], dtype=torch.int32, device=DEVICE)
    expected = seen.clone()
    for slots, token_ids in (([0, -1, 1, 2], [1, 2, 0, -1]), ([0, 1], [1, 2]), ([0], [2])):
        given = torch.tensor(slots, dtype=torch.int32, device=DEVICE), torch.tensor(token_ids, device=DEVICE)
        count_tokens(seen, *given)
        count_tokens_ref(expected, *given)
    assert torch.equal(seen, expected)
    assert seen.tolist() == [[0, 3, 5], [2, 0, 2], [7, 7, 7]]
