"""Tests of scored continuations against a full recompute, and against the prompt logprobs of the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import PHIMOE, Reference

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import RequestError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request, TokenLogprobs
from moray.engine.sampling.scoring import Score, score, scoring_params

ORIGINAL = PHIMOE["original_max_position_embeddings"]  # of the LongRoPE model
CONTEXTS = (1, 2, 15, 16, 17, 30, 31, 32, 33, 47, 60)  # tokens, around blocks and the LongRoPE boundary
CHOICES = ([7], [7, 8], [9, 10, 11, 12, 13], list(range(20, 40)))
BLOCK_BYTES = {"phimoe": 8192, "mixtral": 8192, "phi-msft": 20480}  # in fp32

ROOM = 2**23  # bytes of KV cache: nothing is evicted
CONFIGS = {
    "all at once": EngineConfig(kv_cache_memory=ROOM),
    "one by one": EngineConfig(kv_cache_memory=ROOM, max_num_seqs=1),
    "small chunks": EngineConfig(kv_cache_memory=ROOM, max_num_batched_tokens=7),
    "a token a step": EngineConfig(kv_cache_memory=ROOM, max_num_seqs=1, max_num_batched_tokens=1),
    "a step ahead": EngineConfig(kv_cache_memory=ROOM, max_num_batched_tokens=19, async_scheduling=True),
}

Scored = dict[tuple[int, int], tuple[TokenLogprobs, ...]]


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(1000 * seed + n)).tolist()


def drain(engine: Engine) -> dict[tuple[str, int], Completion]:
    done: dict[tuple[str, int], Completion] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id, output.sample] = output.completion
    assert engine.stats().free_blocks == engine.limits.num_blocks
    engine._scheduler.block_manager.check([])
    return done


def score_all(engine: Engine, contexts: Sequence[int] = CONTEXTS, k: int | None = None) -> Scored:
    """Return the choices' scores after each context, by the context's length and the choice's number."""
    for n in contexts:
        engine.add(Request(str(n), tokens(n), scoring_params(k), continuations=CHOICES))
    return {key: scored for key, scored in _scored(drain(engine)).items() if key[0] in contexts}


def _scored(done: dict[tuple[str, int], Completion]) -> Scored:
    found: Scored = {}
    for (name, sample), completion in done.items():
        if not name.isdigit():
            continue
        entries = completion.prompt_logprobs
        assert entries is not None and (completion.token_ids, completion.finish_reason) == ((), "length")
        assert len(entries) == completion.num_prompt_tokens == int(name) + len(CHOICES[sample])
        assert set(entries[: int(name)]) == {None}
        found[int(name), sample] = tuple(entry for entry in entries[int(name) :] if entry is not None)
    return found


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path]) -> dict[str, dict[tuple[int, int], torch.Tensor]]:
    """Return logprobs [choice's tokens, vocab_size] from one full forward of context and choice."""
    found: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    for name, folder in checkpoints.items():
        model = Reference(folder)
        found[name] = {
            (n, i): model.logits(tokens(n) + choice).log_softmax(-1)[n - 1 : -1]
            for n in CONTEXTS
            for i, choice in enumerate(CHOICES)
        }
    return found


def check(scored: Scored, reference: dict[tuple[int, int], torch.Tensor]) -> None:
    assert scored.keys() == reference.keys()
    for (n, i), table in reference.items():
        entries, choice = scored[n, i], torch.tensor(CHOICES[i])
        assert [entry.token_id for entry in entries] == choice.tolist()
        wanted = table.gather(1, choice[:, None]).squeeze(1)
        assert [entry.logprob for entry in entries] == pytest.approx(wanted.tolist(), abs=1e-4), (n, i)
        found = score(entries)
        assert found.logprob == pytest.approx(wanted.double().sum().item(), abs=1e-4)
        assert found.is_greedy == bool((table.argmax(-1) == choice).all())


@pytest.mark.parametrize(
    "architecture", ["phimoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "phi-msft"))]
)
@pytest.mark.parametrize("how", CONFIGS)
def test_scores_equal_a_full_recompute(
    checkpoints: dict[str, Path], references: dict[str, Any], architecture: str, how: str
) -> None:
    """The scores are right with a cold cache, and with every context and continuation in the prefix cache."""
    engine = Engine(str(checkpoints[architecture]), CONFIGS[how])
    cold = score_all(engine)
    check(cold, references[architecture])
    before = engine.metrics.cached_tokens
    assert score_all(engine) == cold
    full = sum(len(CHOICES) * ((n - 1) // engine.limits.block_size) * engine.limits.block_size for n in CONTEXTS)
    assert engine.metrics.cached_tokens - before >= full > 0


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
@pytest.mark.parametrize("architecture", ["phimoe", "mixtral", "phi-msft"])
def test_a_sequence_preempted_half_scored_goes_on_from_there(
    checkpoints: dict[str, Path], architecture: str, is_async: bool
) -> None:
    """Three decodes leave it one token per step, and take its blocks as they grow."""
    memory = 9 * BLOCK_BYTES[architecture]
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=4, kv_cache_memory=memory, async_scheduling=is_async)
    engine = Engine(str(checkpoints[architecture]), config)
    for i in range(3):
        engine.add(Request(f"busy {i}", tokens(5, seed=i), SamplingParams(max_tokens=60, ignore_eos=True)))
    context, continuation = tokens(10), tokens(40, seed=1)
    engine.add(Request("r", context, scoring_params(None), continuations=[continuation]))
    known: set[int] = set()
    done: dict[str, Completion] = {}
    while engine.has_work:
        done |= {output.request_id: output.completion for output in engine.step() if output.completion is not None}
        known |= {len(seq.prompt_logprobs) for seq in engine._scheduler.waiting if seq.request.request_id == "r"}
    assert any(11 < length < 50 for length in known), f"it was preempted at {known}"
    table = Reference(checkpoints[architecture]).logits(context + continuation).log_softmax(-1)[9:-1]
    entries = done["r"].prompt_logprobs
    assert entries is not None
    wanted = table.gather(1, torch.tensor(continuation)[:, None]).squeeze(1)
    assert [entry.logprob for entry in entries[10:] if entry is not None] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_do_not_depend_on_how_they_come_about(checkpoints: dict[str, Path], dtype: str) -> None:
    """Choices of one request and logprobs of whole prompts, in other batches and chunks, are equal bit by bit."""
    for folder in checkpoints.values():
        together = score_all(Engine(str(folder), EngineConfig(dtype=dtype)), k=3)
        engine = Engine(str(folder), EngineConfig(dtype=dtype, max_num_batched_tokens=19))
        whole = SamplingParams(max_tokens=0, prompt_logprobs=3)
        for n in CONTEXTS:
            for i, choice in enumerate(CHOICES):
                engine.add(Request(f"{n} {i}", tokens(n) + choice, whole))
        for (name, _), completion in drain(engine).items():
            n, i = map(int, name.split())
            assert completion.prompt_logprobs is not None
            assert completion.prompt_logprobs[n:] == together[n, i], (n, i)


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "a step ahead"])
def test_a_request_that_is_aborted_while_its_logprobs_are_unread_leaves_nothing(
    checkpoints: dict[str, Path], is_async: bool
) -> None:
    engine = Engine(str(checkpoints["mixtral"]), EngineConfig(async_scheduling=is_async))
    free = engine.stats().free_blocks
    for seed, name in enumerate(("left", "right")):
        engine.add(Request(name, tokens(20, seed), scoring_params(None), continuations=[[7, 8]]))
    found = [output.request_id for output in engine.step()]
    assert found == ([] if is_async else ["left", "right"])
    engine.abort("left")
    while engine.has_work:
        found += [output.request_id for output in engine.step()]
    assert found == (["right"] if is_async else ["left", "right"])
    assert engine.stats().free_blocks == free
    engine.add(Request("left", tokens(20), scoring_params(None), continuations=[[7, 8]]))
    assert set(drain(engine)) == {("left", 0)}


def test_the_prompt_of_many_choices_is_computed_once(checkpoints: dict[str, Path]) -> None:
    engine = Engine(str(checkpoints["mixtral"]))
    engine.add(Request("r", tokens(100), scoring_params(None), continuations=[[i] for i in range(20)]))
    rows: list[int] = []
    compute_logits = engine.runner.compute_logits
    engine.runner.compute_logits = lambda hidden, at: (rows.append(len(at)), compute_logits(hidden, at))[1]  # type: ignore[func-returns-value, assignment, method-assign]
    assert len(drain(engine)) == 20
    # 96 tokens are full blocks; the other four tokens and the continuation's are run for each continuation.
    assert engine.metrics.cached_tokens == 19 * 96
    assert engine.metrics.computed_tokens == 101 + 19 * 5
    assert rows == [1, 19], "only the rows that are scored go through lm_head"


def test_greedy_continuations_are_greedy_and_others_are_not(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        reference, prompt = Reference(folder), tokens(20)
        best = reference.greedy(prompt, 6)
        other = [*best[:-1], (best[-1] + 1) % 160]
        engine = Engine(str(folder))
        engine.add(Request("1", prompt, scoring_params(None), continuations=[best[:4], other]))
        done = drain(engine)
        of_best, of_other = (score(done["1", i].prompt_logprobs[20:]) for i in (0, 1))  # type: ignore[index, arg-type]
        assert (of_best.is_greedy, of_other.is_greedy) == (True, False)


@pytest.mark.parametrize(
    ("prompt", "continuations", "code"),
    [
        ([], [[5]], "empty_prompt"),
        ([5], [[6], [160]], "bad_token_id"),
        (tokens(100), [[6], tokens(157)], "too_long"),
        (tokens(100), [[6], tokens(29)], "no_cache_room"),
    ],
)
def test_a_request_with_a_continuation_that_cannot_run_leaves_nothing_behind(
    checkpoints: dict[str, Path], prompt: list[int], continuations: list[list[int]], code: str
) -> None:
    engine = Engine(str(checkpoints["mixtral"]), EngineConfig(kv_cache_memory=8 * BLOCK_BYTES["mixtral"]))
    with pytest.raises(RequestError) as caught:
        engine.add(Request("r", prompt, scoring_params(None), continuations=continuations))
    assert caught.value.code == code
    assert not engine.has_work
    engine.add(Request("r", tokens(100), scoring_params(None), continuations=[[6], tokens(28)]))
    assert len(drain(engine)) == 2


def test_a_score_is_summed_in_double_precision_and_in_order() -> None:
    def token(logprob: float, best: int = 1) -> TokenLogprobs:
        return TokenLogprobs(1, logprob, ((best, 0.0),))

    assert score([token(-1e16), token(-1.0), token(-1.0)]) == Score(-1e16, True)
    assert score([token(-1.0), token(-1.0), token(-1e16)]) == Score(-1.0000000000000002e16, True)
    assert score([token(-0.1), token(-0.2, best=2), token(-0.3)]) == Score(-0.1 - 0.2 - 0.3, False)


def test_what_is_asked_of_the_engine() -> None:
    assert scoring_params(None) == SamplingParams(max_tokens=0, prompt_logprobs=1)
    assert scoring_params(0) == SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=1)
    assert scoring_params(5) == SamplingParams(max_tokens=0, logprobs=5, prompt_logprobs=5)
